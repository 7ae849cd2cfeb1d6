//! Both sides of a conversation: what is said, what is heard, and how it ends.

use crate::ring::sim::{End, Random};

/// What a conversation is held over.
pub(super) trait Line {
    /// As [`End::write`].
    fn write(&mut self, bytes: &[u8]) -> Option<usize>;
    /// As [`End::read`].
    fn read(&mut self, room: usize) -> Result<Option<Vec<u8>>, i32>;
    /// As [`End::shutdown_write`]; to be called until it is done.
    fn shutdown_write(&mut self) -> bool;
}

impl Line for End {
    fn write(&mut self, bytes: &[u8]) -> Option<usize> {
        Self::write(self, bytes)
    }

    fn read(&mut self, room: usize) -> Result<Option<Vec<u8>>, i32> {
        Self::read(self, room)
    }

    fn shutdown_write(&mut self) -> bool {
        Self::shutdown_write(self);
        true
    }
}

/// One side of one conversation: what it has still to say and what it heard.
pub(super) struct Talker {
    pub(super) end: Option<Box<dyn Line>>,
    pub(super) say: Vec<u8>,
    pub(super) said: usize,
    pub(super) shut: bool,
    pub(super) heard: Vec<u8>,
    pub(super) outcome: Option<Outcome>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    CleanEnd,
    Reset,
}

impl Talker {
    pub(super) fn new(end: End, say: Vec<u8>) -> Self {
        Self::over(Box::new(end), say)
    }

    pub(super) fn over(end: Box<dyn Line>, say: Vec<u8>) -> Self {
        Self { end: Some(end), say, said: 0, shut: false, heard: Vec::new(), outcome: None }
    }

    pub(super) fn step(&mut self, random: &mut Random) {
        let Some(end) = &mut self.end else { return };
        if self.said < self.say.len() {
            let len = 1 + random.below(40_000);
            let upto = (self.said + len).min(self.say.len());
            match end.write(&self.say[self.said..upto]) {
                Some(written) => self.said += written,
                None => self.outcome = Some(Outcome::Reset),
            }
        } else if !self.shut {
            self.shut = end.shutdown_write();
        }
        if self.outcome.is_none() {
            match end.read(1 + random.below(50_000)) {
                Ok(Some(bytes)) if bytes.is_empty() => self.outcome = Some(Outcome::CleanEnd),
                Ok(Some(bytes)) => self.heard.extend(bytes),
                Ok(None) => {}
                Err(_) => self.outcome = Some(Outcome::Reset),
            }
        }
        let done = self.outcome == Some(Outcome::Reset) || (self.outcome.is_some() && self.shut);
        if done {
            self.end = None;
        }
    }
}

pub(super) fn payload(random: &mut Random, len: usize) -> Vec<u8> {
    (0..len).map(|_| random.number() as u8).collect()
}

/// Mostly a message, sometimes a bulk that promotes its buffers.
pub(super) fn length(random: &mut Random) -> usize {
    let most = if random.chance(0.3) { 400_000 } else { 3_000 };
    random.below(most)
}

pub(super) fn check(heard: &Talker, said: &Talker, whole: &str) {
    assert!(said.say.starts_with(&heard.heard), "{whole}: bytes changed or came out of order");
    if heard.outcome == Some(Outcome::CleanEnd) {
        assert_eq!(heard.heard.len(), said.say.len(), "{whole}: a clean end before all bytes came");
    }
}
