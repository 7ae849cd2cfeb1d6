//! The one loop under every watch: block where there is room, poll where there is not, keep the last good answer.
//!
//! Invariant: an error, a garbled answer or an absent agent is reported as trouble and never as data; after an error the
//! next reads do not block and accept what the agent has cached, until one shows that the servers are back.

pub(crate) mod chain;
pub(crate) mod checks;
pub(crate) mod definition;
pub(crate) mod health;
pub(crate) mod hosts;
pub(crate) mod intentions;
pub(crate) mod leaf;
pub(crate) mod mesh;
pub(crate) mod query;
pub(crate) mod roots;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};

use super::budget::Class;
use super::client::{Client, Request, Response};
use super::cursor::{Cursor, Style};
use super::error::AgentError;
use super::wire;
use crate::control::backoff::{Backoff, Pace, jittered};
use crate::policy::{DefaultPolicy, Intention};
use crate::tls::TlsParams;

/// How long a blocking query waits. Shorter than Consul's default of 5 minutes, because the agent counts the connection of
/// a query that was given up until its wait is over (seen with 1.8.7: resets at 160 connections after 40 were given up).
const WAIT: Duration = Duration::from_secs(60);
/// Between two reads of a watch that has no place to block in.
const POLL_INTERVAL: Duration = Duration::from_secs(2);
/// Events that may wait for the feeder; a full queue slows the watches down.
pub(crate) const EVENTS_MAX: usize = 256;

/// A service as a query names it; namespace and partition are empty for the default ones.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Name {
    pub(crate) service: String,
    pub(crate) namespace: String,
    pub(crate) partition: String,
}

/// What a watch watches. Equal keys share one watch.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Key {
    /// The keeper of the ACL token.
    Token,
    /// The proxy of this number.
    Definition(usize),
    Checks(checks::Ask),
    Roots,
    Mesh,
    Leaf(Name),
    Intentions(Name),
    Chain(chain::Ask),
    Health(health::Ask),
    Query {
        name: String,
        datacenter: String,
    },
    Host(String),
}

/// What a watch tells the feeder.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) key: Key,
    pub(crate) what: What,
}

#[derive(Debug)]
pub(crate) enum What {
    Data(Update),
    /// Nothing usable came; what was learned before stays in force.
    Trouble(String),
    Recovered,
    /// The thing itself is not there any more.
    Gone(String),
}

/// New content, parsed.
#[derive(Debug)]
pub(crate) enum Update {
    Definition(Box<wire::Service>),
    Checks(checks::Checks),
    Roots(wire::Roots),
    Mesh(TlsParams),
    Leaf(wire::Leaf),
    Intentions(Vec<Intention>),
    Default(DefaultPolicy),
    Chain(chain::Chain),
    Instances(Vec<health::Instance>),
    Host(Vec<IpAddr>),
}

/// What every watch is given.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) key: Key,
    pub(crate) events: mpsc::Sender<Event>,
    /// Asks for a full read now.
    pub(crate) nudge: Arc<Notify>,
}

/// How a watch asks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spec {
    pub(crate) class: Class,
    pub(crate) style: Style,
    /// The agent can answer from its own memory, kept fresh in the background (`?cached`).
    pub(crate) cached: bool,
}

impl Context {
    pub(crate) async fn data(&self, update: Update) {
        self.send(What::Data(update)).await;
    }

    pub(crate) async fn trouble(&self, text: String) {
        self.send(What::Trouble(text)).await;
    }

    pub(crate) async fn recovered(&self) {
        self.send(What::Recovered).await;
    }

    pub(crate) async fn gone(&self, text: String) {
        self.send(What::Gone(text)).await;
    }

    async fn send(&self, what: What) {
        // A closed queue means that the feeder has ended; this task is about to be ended too.
        let _ = self.events.send(Event { key: self.key.clone(), what }).await;
    }
}

/// Follows `request` for ever, or until the agent says that the thing is not there (404).
pub(crate) async fn follow(
    cx: &Context,
    spec: Spec,
    request: &Request,
    decode: impl Fn(&Response) -> Result<Update, AgentError>,
) -> AgentError {
    let mut follower = Follower::new(cx, spec, request);
    loop {
        match follower.turn().await {
            Turn::Answer { response, changed: true } => match decode(&response) {
                Ok(update) => {
                    follower.accept(&response);
                    cx.data(update).await;
                    follower.went_well(&response).await;
                }
                Err(error) => follower.went_wrong(&error).await,
            },
            Turn::Answer { response, changed: false } => follower.went_well(&response).await,
            Turn::Failed(error @ AgentError::NotFound { .. }) => return error,
            Turn::Failed(error) => follower.went_wrong(&error).await,
            Turn::Interrupted => {}
        }
    }
}

/// What one turn of the loop brought.
pub(crate) enum Turn {
    Answer {
        response: Response,
        changed: bool,
    },
    Failed(AgentError),
    /// A nudge, a replaced token or a request to make room: turn again.
    Interrupted,
}

/// One watch's position between its turns.
pub(crate) struct Follower<'a> {
    cx: &'a Context,
    spec: Spec,
    request: &'a Request,
    pub(crate) cursor: Cursor,
    backoff: Backoff,
    pace: Pace,
    /// In trouble: read without blocking until an answer is fresh.
    pub(crate) failing: bool,
    /// Whether the last answer came without a place to block in.
    polling: bool,
    token: tokio::sync::watch::Receiver<super::token::State>,
    _announced: super::budget::Wanted,
}

impl<'a> Follower<'a> {
    pub(crate) fn new(cx: &'a Context, spec: Spec, request: &'a Request) -> Self {
        Self {
            cx,
            spec,
            request,
            cursor: Cursor::new(spec.style),
            backoff: Backoff::agent(),
            pace: Pace::new(Instant::now()),
            failing: false,
            polling: false,
            token: cx.client.token().subscribe(),
            _announced: cx.client.budget().announce(spec.class),
        }
    }

    /// One request, blocking where there is a place. It is given up only for a nudge or for a more urgent watch: a query
    /// with a replaced token may end by itself.
    pub(crate) async fn turn(&mut self) -> Turn {
        let budget = self.cx.client.budget();
        let block_on = if self.failing { None } else { self.cursor.block_on() };
        let place = block_on.as_ref().and_then(|_| budget.enter(self.spec.class));
        self.polling = block_on.is_some() && place.is_none();
        let mut request = self.request.clone();
        if self.spec.cached {
            request = request.with("cached", "1");
        }
        let answer = async {
            match block_on.filter(|_| place.is_some()) {
                Some((name, position)) => self.cx.client.wait(&request.with(name, &position), jittered(WAIT)).await,
                None => self.cx.client.call(&request).await,
            }
        };
        let result = tokio::select! {
            result = answer => result,
            () = self.cx.nudge.notified() => { self.cursor.restart(); return Turn::Interrupted }
            () = budget.asked_to_yield(self.spec.class), if place.is_some() => { return Turn::Interrupted }
        };
        match result {
            Ok(response) => {
                let changed = self.cursor.observe(&response);
                Turn::Answer { response, changed }
            }
            // The token was replaced while the query was blocked: only the old one is unknown.
            Err(AgentError::TokenUnknown { .. }) if self.token.has_changed().unwrap_or(false) => {
                self.token.mark_unchanged();
                self.cursor.restart();
                Turn::Interrupted
            }
            Err(error) => Turn::Failed(error),
        }
    }

    pub(crate) fn accept(&mut self, response: &Response) {
        self.cursor.accept(response);
    }

    /// After a good answer: leaves trouble behind if the answer is fresh, and waits as long as it must.
    pub(crate) async fn went_well(&mut self, response: &Response) {
        if self.failing && response.age.unwrap_or(0) == 0 {
            self.failing = false;
            self.backoff.reset();
            self.cx.recovered().await;
        }
        let wait = if self.failing {
            self.backoff.wait()
        } else if self.polling || self.cursor.block_on().is_none() {
            jittered(POLL_INTERVAL)
        } else {
            self.pace.take(Instant::now())
        };
        self.rest(wait).await;
    }

    pub(crate) async fn went_wrong(&mut self, error: &AgentError) {
        tracing::debug!(key = ?self.cx.key, %error, "watch in trouble");
        self.failing = true;
        self.cursor.restart();
        self.cx.trouble(error.to_string()).await;
        let wait = self.backoff.wait();
        self.rest(wait).await;
    }

    async fn rest(&mut self, wait: Duration) {
        if wait.is_zero() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = self.cx.nudge.notified() => self.cursor.restart(),
            Ok(()) = self.token.changed() => self.cursor.restart(),
        }
    }
}

/// Follows `request`, telling of each 404 and trying again for ever.
pub(crate) async fn follow_always(
    cx: &Context,
    spec: Spec,
    request: &Request,
    decode: impl Fn(&Response) -> Result<Update, AgentError>,
) {
    let mut backoff = Backoff::agent();
    loop {
        let error = follow(cx, spec, request, &decode).await;
        cx.gone(error.to_string()).await;
        tokio::time::sleep(backoff.wait()).await;
    }
}

/// Asks again and again for what no endpoint blocks on, and tells what is new. `decode` says how long an answer is good for.
pub(crate) async fn poll<T: PartialEq + Clone>(
    cx: &Context,
    request: &Request,
    mut backoff: Backoff,
    decode: impl Fn(&Response) -> Result<(T, Duration), AgentError>,
    update: impl Fn(T) -> Update,
    problem: impl Fn(AgentError) -> String,
) {
    let mut last = None;
    let mut token = cx.client.token().subscribe();
    loop {
        let wait = match cx.client.call(request).await.and_then(|response| decode(&response)) {
            Ok((found, good_for)) => {
                backoff.reset();
                cx.recovered().await;
                if last.as_ref() != Some(&found) {
                    last = Some(found.clone());
                    cx.data(update(found)).await;
                }
                jittered(good_for)
            }
            Err(error) => {
                cx.trouble(problem(error)).await;
                backoff.wait()
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            Ok(()) = token.changed() => {}
        }
    }
}

/// Runs the watch of `cx.key`. Never ends by itself.
pub(crate) async fn run(cx: Context, proxy: Option<crate::config::Proxy>) {
    match cx.key.clone() {
        Key::Token => {}
        Key::Definition(_) => {
            if let Some(proxy) = proxy {
                definition::watch(&cx, &proxy).await;
            }
        }
        Key::Checks(ask) => checks::watch(&cx, &ask).await,
        Key::Roots => roots::watch(&cx).await,
        Key::Mesh => mesh::watch(&cx).await,
        Key::Leaf(name) => leaf::watch(&cx, &name).await,
        Key::Intentions(name) => intentions::watch(&cx, &name).await,
        Key::Chain(ask) => chain::watch(&cx, &ask).await,
        Key::Health(ask) => health::watch(&cx, &ask).await,
        Key::Query { name, datacenter } => query::watch(&cx, &name, &datacenter).await,
        Key::Host(host) => hosts::watch(&cx, &host).await,
    }
}

impl Name {
    /// Adds namespace and partition to a request, where set.
    pub(crate) fn scope(&self, request: Request) -> Request {
        request.with("ns", &self.namespace).with("partition", &self.partition)
    }
}
