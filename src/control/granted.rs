//! Which identities local callers need, besides the services that this process fronts. Pure; the clock is handed in.
//!
//! Invariant: at most `max` names are kept; one that is asked for again stays, the one not asked for longest goes first. A
//! name is a wish, not a right: the rules have granted it before it comes here.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::consul::watch::Name;

/// How long a certificate is kept warm after the last wish for it.
const KEEP: Duration = Duration::from_secs(3_600);
/// A name that was wished for within this time is in use: a newcomer must wait rather than push it out.
const IN_USE: Duration = Duration::from_secs(60);

/// The names, each with the last wish for it.
#[derive(Debug)]
pub(crate) struct Granted {
    max: usize,
    wished: BTreeMap<Name, Instant>,
}

impl Granted {
    pub(crate) fn new(max: usize) -> Self {
        Self { max, wished: BTreeMap::new() }
    }

    /// Wishes for a name. False when it cannot be had because too many others are in use.
    pub(crate) fn wish(&mut self, name: Name, now: Instant) -> bool {
        if !self.wished.contains_key(&name) && self.wished.len() >= self.max {
            let oldest = self.wished.iter().min_by_key(|(_, at)| **at).map(|(name, at)| (name.clone(), *at));
            match oldest {
                Some((oldest, at)) if now.duration_since(at) >= IN_USE => drop(self.wished.remove(&oldest)),
                _ => return false,
            }
        }
        self.wished.insert(name, now);
        true
    }

    /// Lets go of what nobody has wished for in a long time.
    pub(crate) fn tick(&mut self, now: Instant) {
        self.wished.retain(|_, at| now.duration_since(*at) < KEEP);
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &Name> {
        self.wished.keys()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(service: &str) -> Name {
        Name { service: service.into(), namespace: String::new(), partition: String::new() }
    }

    fn names(granted: &Granted) -> Vec<&str> {
        granted.names().map(|name| name.service.as_str()).collect()
    }

    #[test]
    fn the_one_unused_longest_makes_room() {
        let mut granted = Granted::new(2);
        let start = Instant::now();
        assert!(granted.wish(name("a"), start) && granted.wish(name("b"), start + Duration::from_secs(1)));
        assert!(!granted.wish(name("c"), start + Duration::from_secs(2)), "both are in use");
        assert!(granted.wish(name("a"), start + Duration::from_secs(61)), "one that is there is never refused");
        assert!(granted.wish(name("c"), start + Duration::from_secs(62)));
        assert_eq!(names(&granted), ["a", "c"]);
    }

    #[test]
    fn what_nobody_asks_for_is_let_go() {
        let mut granted = Granted::new(2);
        let start = Instant::now();
        granted.wish(name("a"), start);
        granted.wish(name("b"), start + KEEP / 2);
        granted.tick(start + KEEP);
        assert_eq!(names(&granted), ["b"]);
    }

    #[test]
    fn without_callers_no_name_is_granted() {
        assert!(!Granted::new(0).wish(name("a"), Instant::now()));
    }
}
