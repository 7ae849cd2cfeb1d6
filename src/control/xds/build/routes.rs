//! Routers of listeners whose connections are told apart: mesh and terminating gateways, transparent proxying, permissive mode.
//!
//! Invariant: a chain that cannot be served takes its connections and ends them, rather than that they fall to a chain which
//! takes more; only it is named. Where TLS ends, no chain leads bytes past it but one that Consul sent as such.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::{Allowed, Builder, Front, keep_service, same_parts};
use crate::config;
use crate::control::build::{keep, keep_text};
use crate::control::xds::cluster::{Cluster, Discovery};
use crate::control::xds::listener::{self, Chain, Destination, Ending, Listener, Passage, Routes, Tuning};
use crate::control::xds::tls_context::{Material, Spoken};
use crate::mesh::router::{Match, Original, Route, Router, RouterSettings, ServerName, Way};
use crate::mesh::{Address, PublicListener, Service, Target, Upstream};
use crate::policy::Intentions;

/// The routes that a listener had, by their names.
type OldRoutes<'a> = HashMap<&'a str, &'a Arc<Route>>;

impl Builder<'_> {
    /// The router of a listener; none where its chains cannot be told apart.
    pub(super) fn router(&mut self, listener: &Listener, routes: &Routes, old: &[Arc<Router>]) -> Option<Arc<Router>> {
        let of_old = |old: &&Arc<Router>| *old.settings().name == *listener.name && old.settings().bind == listener.bind;
        let old = old.iter().find(of_old);
        let old_routes = old.iter().flat_map(|old| old.routes()).map(|route| (&*route.name, route)).collect();
        let old_routes = &old_routes;
        let ends_tls = routes.all().any(|chain| matches!(chain.way, listener::Way::End(_)));
        let by_name = |chain: &&Chain| matches!(chain.way, listener::Way::ServerName);
        let told = routes.chains.iter().filter(|chain| !by_name(chain));
        let mut next: Vec<Arc<Route>> = told.map(|chain| self.route(listener, routes, chain, old_routes)).collect();
        // Consul ends the chains of a terminating gateway with one to no cluster, to have unknown names reset. A cluster of the
        // name that a client asks for would be reached past the intentions.
        if !ends_tls && routes.all().any(|chain| by_name(&chain)) {
            next.extend(self.by_server_name(listener, routes, old_routes));
        }
        let fallback = routes.fallback.as_ref().filter(|chain| !by_name(chain));
        let fallback = fallback.map(|chain| self.route(listener, routes, chain, old_routes));
        let settings = RouterSettings {
            name: keep_text(old.map(|old| &old.settings().name), &listener.name),
            service: keep_text(old.map(|old| &old.settings().service), self.around.cluster),
            proxy_id: keep_text(old.map(|old| &old.settings().proxy_id), self.around.proxy_id),
            bind: listener.bind.clone(),
            transparent: routes.transparent,
            permissive: ends_tls
                && routes.all().any(|chain| matches!(&chain.way, listener::Way::Pass(way) if way.front.is_none())),
            inspect_timeout: routes.inspect_timeout,
            silent_is_raw: routes.silent_is_raw,
            routes: next,
            fallback,
        };
        if let Some(old) = old.filter(|old| same_settings(old.settings(), &settings)) {
            return Some(Arc::clone(old));
        }
        Router::new(settings).map(Arc::new).map_err(|why| self.notes.push(why.to_string())).ok()
    }

    /// `sni_cluster`: a route for each cluster whose name a client may ask for and no other chain takes.
    fn by_server_name(&mut self, listener: &Listener, routes: &Routes, old: &OldRoutes<'_>) -> Vec<Arc<Route>> {
        let by_name = routes.all().find(|chain| matches!(chain.way, listener::Way::ServerName));
        let tuning = by_name.map_or_else(Tuning::default, |chain| chain.tuning);
        let (mut exact, mut suffixes) = (HashSet::new(), HashSet::new());
        for known in routes.all().flat_map(|chain| &chain.matches.server_names) {
            match known {
                ServerName::Exact(name) => exact.insert(&**name),
                ServerName::Under(suffix) => suffixes.insert(&**suffix),
            };
        }
        let taken = |name: &str| exact.contains(name) || name.match_indices('.').any(|(dot, _)| suffixes.contains(&name[dot..]));
        let plain = self.held.clusters.values().filter(|cluster| cluster.spoken == Spoken::Plain);
        let mut seen = HashSet::new();
        let names: Vec<(String, ServerName)> = plain
            .filter(|cluster| !matches!(cluster.discovery, Discovery::OriginalDestination))
            .filter_map(|cluster| match cluster.name.parse().ok()? {
                // Names differ in more than case, or the second is none.
                ServerName::Exact(name) if !taken(&name) && seen.insert(Arc::clone(&name)) => {
                    Some((cluster.name.clone(), ServerName::Exact(name)))
                }
                ServerName::Exact(_) | ServerName::Under(_) => None,
            })
            .collect();
        let named: HashSet<&str> = routes.all().map(|chain| chain.name.as_str()).collect();
        let route = |(cluster, name): (String, ServerName)| {
            let matches = Match { server_names: vec![name], ..Match::default() };
            let name = if named.contains(cluster.as_str()) { format!("{cluster} by its name") } else { cluster.clone() };
            let way = listener::Way::Pass(Passage { to: Destination::Cluster(cluster), front: None });
            self.route(listener, routes, &Chain { name, matches, way, tuning }, old)
        };
        names.into_iter().map(route).collect()
    }

    fn route(&mut self, listener: &Listener, routes: &Routes, chain: &Chain, old: &OldRoutes<'_>) -> Arc<Route> {
        let old = old.get(chain.name.as_str()).copied();
        let way = match &chain.way {
            listener::Way::End(ending) => self.end(listener, chain, ending, old),
            listener::Way::Pass(passage) => self.pass(listener, routes, chain, passage, old).unwrap_or_else(|why| {
                self.note(listener, chain, &why);
                Way::Forward(nowhere(listener, chain))
            }),
            listener::Way::ServerName => Way::Forward(nowhere(listener, chain)),
        };
        match old {
            Some(old) if old.matches == chain.matches && same_way(&old.way, &way) => Arc::clone(old),
            _ => Arc::new(Route { name: chain.name.as_str().into(), matches: chain.matches.clone(), way }),
        }
    }

    /// A way that begins with no caller of the mesh, as its cluster says.
    fn pass(
        &self,
        listener: &Listener,
        routes: &Routes,
        chain: &Chain,
        passage: &Passage,
        old: Option<&Arc<Route>>,
    ) -> Result<Way, String> {
        let name = self.named(&passage.to)?;
        let cluster = self.cluster(name)?;
        match &cluster.discovery {
            Discovery::OriginalDestination if !routes.transparent => {
                return Err(format!("cluster {name} leads to original destinations, and nothing is redirected here"));
            }
            Discovery::OriginalDestination if cluster.spoken == Spoken::Plain && passage.front.is_none() => {
                let Cluster { connect_timeout, max_connections, keepalive, .. } = *cluster;
                let idle_timeout = chain.tuning.idle_timeout;
                return Ok(Way::Original(Original { connect_timeout, max_connections, idle_timeout, keepalive }));
            }
            _ => {}
        }
        let old_upstream = old.and_then(|old| match &old.way {
            Way::Originate { upstream, .. } | Way::Forward(upstream) => Some(upstream),
            Way::Terminate { .. } | Way::Original(_) => None,
        });
        let allowed = match cluster.discovery {
            Discovery::OriginalDestination => Allowed::MeshAtOriginal,
            _ => Allowed::Mesh,
        };
        let leaves = self.leaves(name, allowed)?;
        let front = front(listener, chain);
        match leaves.iter().find_map(|leaf| leaf.spoken.mesh()) {
            Some(tls) => {
                let upstream = self.upstream(name, front, allowed, old_upstream)?;
                let service = self.route_service(&tls.material, Arc::new(Intentions::unknown()), None, old);
                Ok(Way::Originate { service, upstream })
            }
            None if routes.outbound || passage.front.is_some() => {
                Err(format!("cluster {name} has no UpstreamTlsContext of the mesh, and nothing leaves without"))
            }
            None => self.upstream(name, front, Allowed::AsItCame, old_upstream).map(Way::Forward),
        }
    }

    fn end(&mut self, listener: &Listener, chain: &Chain, ending: &Ending, old: Option<&Arc<Route>>) -> Way {
        let old_app = old.and_then(|old| match &old.way {
            Way::Terminate { app, .. } => app.as_ref(),
            Way::Forward(_) | Way::Originate { .. } | Way::Original(_) => None,
        });
        let behind = self.behind(listener, chain, ending, old_app).unwrap_or_else(|why| {
            self.note(listener, chain, &why);
            (Vec::new(), Some(nowhere(listener, chain)))
        });
        let (app, upstream) = behind;
        let cluster = self.named(&ending.to).and_then(|name| self.cluster(name)).ok();
        let public = PublicListener {
            bind: listener.bind.clone(),
            app,
            local_connect_timeout: cluster.map_or(config::CONNECT_TIMEOUT, |cluster| cluster.connect_timeout),
            local_keepalive: cluster.and_then(|cluster| cluster.keepalive),
            handshake_timeout: config::HANDSHAKE_TIMEOUT,
            max_inbound_connections: ending.max_connections,
            idle_timeout: chain.tuning.idle_timeout,
        };
        let service = self.route_service(&ending.material, Arc::clone(&ending.intentions), Some(public), old);
        Way::Terminate { service, app: upstream }
    }

    /// The app: its addresses where the cluster tells them, or endpoints to choose from.
    fn behind(
        &self,
        listener: &Listener,
        chain: &Chain,
        ending: &Ending,
        old: Option<&Arc<Upstream>>,
    ) -> Result<(Vec<Address>, Option<Arc<Upstream>>), String> {
        let name = self.named(&ending.to)?;
        let cluster = self.cluster(name)?;
        if matches!(cluster.discovery, Discovery::Static(_)) && cluster.spoken == Spoken::Plain {
            return Ok((self.app(cluster)?, None));
        }
        let upstream = self.upstream(name, front(listener, chain), Allowed::App, old)?;
        Ok((Vec::new(), Some(upstream)))
    }

    /// The service whose certificate a chain or cluster has.
    fn route_service(
        &self,
        material: &Material,
        intentions: Arc<Intentions>,
        public: Option<PublicListener>,
        old: Option<&Arc<Route>>,
    ) -> Arc<Service> {
        let old = old.and_then(|old| old.way.service());
        let name = material.leaf.service_name().map_or(self.around.cluster, |name| &*name.service);
        let next = Service {
            name: keep_text(old.map(|old| &old.name), name),
            proxy_id: keep_text(old.map(|old| &old.proxy_id), self.around.proxy_id),
            identity: self.around.identities.of(material).map(Arc::clone),
            intentions: keep((*intentions).clone(), old.map(|old| &old.intentions)),
            public: public.map(|public| keep(public, old.and_then(|old| old.public.as_ref()))),
            upstreams: Vec::new(),
        };
        keep_service(next, old)
    }

    fn note(&mut self, listener: &Listener, chain: &Chain, why: &str) {
        self.notes.push(format!("listener {}: {}: {why}", listener.name, chain.name));
    }
}

fn front<'a>(listener: &'a Listener, chain: &'a Chain) -> Front<'a> {
    let tls = match &chain.way {
        listener::Way::Pass(passage) => passage.front.as_deref(),
        listener::Way::End(_) | listener::Way::ServerName => None,
    };
    Front { label: &chain.name, bind: &listener.bind, tuning: chain.tuning, tls }
}

/// A cluster without an endpoint: whoever gets there is reset at once.
fn nowhere(listener: &Listener, chain: &Chain) -> Arc<Upstream> {
    let id = chain.way.name().unwrap_or(&chain.name).into();
    let nobody = Target { id, sni: "".into(), expected: [].into(), endpoints: [].into(), access: None };
    Arc::new(Upstream::new(chain.name.as_str(), listener.bind.clone(), vec![Arc::new(nobody)]))
}

fn same_way(a: &Way, b: &Way) -> bool {
    match (a, b) {
        (Way::Forward(a), Way::Forward(b)) => a == b,
        (Way::Terminate { service, app }, Way::Terminate { service: other, app: of_other }) => {
            Arc::ptr_eq(service, other) && app == of_other
        }
        (Way::Originate { service, upstream }, Way::Originate { service: other, upstream: of_other }) => {
            Arc::ptr_eq(service, other) && upstream == of_other
        }
        (Way::Original(a), Way::Original(b)) => a == b,
        _ => false,
    }
}

fn same_settings(a: &RouterSettings, b: &RouterSettings) -> bool {
    let texts = |settings: &RouterSettings| [&settings.name, &settings.service, &settings.proxy_id].map(Arc::clone);
    let plain = |settings: &RouterSettings| {
        let RouterSettings { transparent, permissive, inspect_timeout, silent_is_raw, .. } = *settings;
        (transparent, permissive, inspect_timeout, silent_is_raw)
    };
    texts(a) == texts(b)
        && plain(a) == plain(b)
        && a.bind == b.bind
        && same_parts(&a.routes, &b.routes)
        && same_parts(a.fallback.as_slice(), b.fallback.as_slice())
}
