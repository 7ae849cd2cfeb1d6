//! Whether a process can be the task that it claims to be: what stands above it decides, never what it says.
//!
//! Invariant: `Ok` means that the whole line of parents was seen, that a believed part of Airflow which runs tasks is in it,
//! and that no supervisor in it watches another task.

use super::super::process::{Chain, Host, ProcessFacts};
use super::refusal::named;
use super::titles::{Role, TitledTask, role};
use super::{Claim, Parts, Peer, RegisterError, Roots, Supervisor, highest};
use crate::mesh::caller::Task;

/// Characters of a title in a refusal.
const TITLE_SHOWN: usize = 200;

/// Whether the process is still the one that connected.
pub(super) fn peer(chain: &Chain, peer: Peer) -> Result<(), RegisterError> {
    let own = chain.own();
    if own.uid != peer.uid {
        return Err(RegisterError::User { pid: peer.pid, connected: peer.uid, now: own.uid });
    }
    if !chain.complete {
        return Err(RegisterError::Lineage { pid: peer.pid });
    }
    Ok(())
}

/// Whether its parents are those of a task, and of this one.
pub(super) fn lineage(
    host: &Host,
    parts: &Parts<'_>,
    roots: &mut Roots,
    chain: &Chain,
    claim: &Claim,
    task: &Task,
) -> Result<(), RegisterError> {
    let pid = chain.own().process.pid;
    let Some(root) = highest(chain.ancestors(), parts, |part| part.runs_tasks) else {
        return Err(RegisterError::NoRoot { pid, ancestry: chain.ancestry() });
    };
    if let Some(elder) = roots.usurped(host, parts, chain, &root)? {
        return Err(RegisterError::Usurped { pid, root: root.facts.process, elder, part: root.part.name });
    }
    chain.ancestors().iter().try_for_each(|ancestor| supervised(pid, ancestor, task))?;
    match claim.supervisor {
        Supervisor::Task => Ok(()),
        Supervisor::Itself => supervises(chain.own(), task),
    }
}

/// Whether a process above has nothing against the claim.
fn supervised(pid: u32, ancestor: &ProcessFacts, task: &Task) -> Result<(), RegisterError> {
    let supervised = match role(&ancestor.title) {
        Some(Role::Parser) => return Err(RegisterError::Parser { pid, parser: ancestor.process }),
        Some(Role::Supervisor(Some(uuid))) if uuid.to_string() != *task.instance => format!("task instance {uuid}"),
        Some(Role::Slot(Some(titled)) | Role::Supervisor2(Some(titled))) if !is_same(&titled, task) => {
            format!("{}.{} of {}", titled.dag, titled.task, titled.run)
        }
        _ => return Ok(()),
    };
    let claimed = match &*task.instance {
        "" => named(task),
        instance => format!("{}, task instance {instance}", named(task)),
    };
    Err(RegisterError::Supervised { pid, claimed, supervisor: ancestor.process, supervised })
}

/// Whether the process is titled as this task's supervisor: its executor titled it before the author's code ran in it.
fn supervises(own: &ProcessFacts, task: &Task) -> Result<(), RegisterError> {
    if let Some(Role::Supervisor2(Some(titled))) = role(&own.title)
        && is_same(&titled, task)
    {
        return Ok(());
    }
    let title = own.title.chars().take(TITLE_SHOWN).collect();
    Err(RegisterError::NoSupervisor { pid: own.process.pid, claimed: named(task), title })
}

fn is_same(titled: &TitledTask, task: &Task) -> bool {
    let TitledTask { dag, task: id, run, map_index } = titled;
    (dag.as_str(), id.as_str(), run.as_str(), *map_index) == (&*task.dag, &*task.task, &*task.run, task.map_index)
}
