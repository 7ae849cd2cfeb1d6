//! The question of a worker that a look-up cannot answer, "who is this?", and its answer: two bounded rings, no lock.
//!
//! Invariant: one worker and one answering thread; a question names a connection by slot and generation, so an answer that
//! comes too late meets nobody. A full ring refuses, and the caller is then nobody known.

use std::sync::Arc;

use super::Wake;
use crate::mesh::caller::Caller;

/// Questions of one worker that may wait, and answers for it.
pub const QUESTIONS_MAX: usize = 1_024;

/// What the kernel says of a local connection's client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// Owner of its socket.
    pub uid: u32,
    /// Inode of its socket; 0 when the client has closed it.
    pub inode: u64,
    /// Cgroup in which it was made; 0 when the kernel does not tell.
    pub cgroup: u64,
    /// The process that connected, known for unix sockets only.
    pub pid: Option<u32>,
}

/// What a worker asks.
#[derive(Debug)]
pub enum Question {
    /// Who is behind this connection? Gets an [`Answer`].
    Who {
        /// The connection's slot.
        slot: u32,
        /// The slot's life.
        generation: u32,
        /// What the kernel says; `None` when it knows the connection no more.
        origin: Option<Origin>,
    },
    /// A certificate for this identity, please: a connection waits for it. The snapshot is the answer.
    Warm(Arc<str>),
}

/// What became of it.
#[derive(Debug)]
pub struct Answer {
    /// As in the question.
    pub slot: u32,
    /// As in the question.
    pub generation: u32,
    /// Who it is.
    pub caller: Arc<Caller>,
}

/// A worker's side.
pub struct Inquirer {
    questions: rtrb::Producer<Question>,
    answers: rtrb::Consumer<Answer>,
    wake: Option<Box<dyn Wake>>,
}

/// The answering thread's side.
pub struct Desk {
    questions: rtrb::Consumer<Question>,
    answers: rtrb::Producer<Answer>,
    wake: Option<Box<dyn Wake>>,
}

/// A pair for each of `workers`.
pub fn open(workers: usize) -> (Vec<Inquirer>, Vec<Desk>) {
    let pairs = (0..workers).map(|_| {
        let (question, questions) = rtrb::RingBuffer::new(QUESTIONS_MAX);
        let (answer, answers) = rtrb::RingBuffer::new(QUESTIONS_MAX);
        (Inquirer { questions: question, answers, wake: None }, Desk { questions, answers: answer, wake: None })
    });
    pairs.unzip()
}

impl Inquirer {
    /// Asks; false when too many questions wait already.
    pub fn ask(&mut self, question: Question) -> bool {
        let asked = self.questions.push(question).is_ok();
        if let Some(wake) = &self.wake {
            wake.wake();
        }
        asked
    }

    /// Rouses the answering thread when a question is there.
    pub fn set_wake(&mut self, wake: Box<dyn Wake>) {
        self.wake = Some(wake);
    }

    /// The next answer that is there.
    pub fn answer(&mut self) -> Option<Answer> {
        self.answers.pop().ok()
    }
}

impl Desk {
    /// Rouses the worker when an answer is there.
    pub fn set_wake(&mut self, wake: Box<dyn Wake>) {
        self.wake = Some(wake);
    }

    /// The next question that is there.
    pub fn question(&mut self) -> Option<Question> {
        self.questions.pop().ok()
    }

    /// Answers. A full ring means that the worker does not turn; its connection then meets its deadline.
    pub fn answer(&mut self, answer: Answer) {
        let _ = self.answers.push(answer);
        if let Some(wake) = &self.wake {
            wake.wake();
        }
    }
}

impl std::fmt::Debug for Inquirer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inquirer").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::caller::{Refusal, Stranger, Tier, Who};

    #[test]
    fn an_answer_reaches_the_worker_that_asked() {
        let (mut inquirers, mut desks) = open(2);
        assert!(inquirers[1].ask(Question::Who { slot: 7, generation: 3, origin: None }));
        assert!(desks[0].question().is_none());
        let Some(Question::Who { slot, generation, .. }) = desks[1].question() else { panic!("asked") };
        let refusal = Refusal { rule: "default".into(), why: "nobody".into(), remedy: "register".into() };
        let caller = Caller { who: Who::Stranger(Stranger::default()), tier: Tier::Unidentified, verdict: Err(refusal) };
        desks[1].answer(Answer { slot, generation, caller: Arc::new(caller) });
        let answer = inquirers[1].answer().expect("answered");
        assert_eq!((answer.slot, answer.generation), (7, 3));
        assert!(inquirers[0].answer().is_none());
    }

    #[test]
    fn a_full_desk_refuses() {
        let (mut inquirers, _desks) = open(1);
        let mut ask = || inquirers[0].ask(Question::Warm("airflow-etl".into()));
        assert!((0..QUESTIONS_MAX).all(|_| ask()));
        assert!(!ask());
    }
}
