//! Envoy's access logs: one line a connection, in formats made of Envoy's operators.
//!
//! Invariant: a format is read once, when its log is opened, and refused whole with the operator's name where Envoy would
//! refuse it; after that a line cannot fail. Nothing here blocks (`spool`). A log that is replaced at run time goes on until
//! its writer has taken its last line.
//!
//! Knows no Consul and no xDS: both end in [`AccessLog`]. What a line says of a connection is in [`value`], what its
//! response flags mean in [`flags`]. `%RINGFENCE(field)%` is ours: any field of the connection log.

mod certificate;
mod field;
mod flags;
mod format;
mod operator;
mod stamp;
mod value;

use std::collections::BTreeSet;
use std::time::SystemTime;

use super::{Counts, Destination, LogError, Reopener, Spool};
use crate::config::LogTarget;
use crate::config::envoy::{AccessLog, AccessLogFormat, Logged};
use crate::telemetry::record::ConnectionRecord;

use format::Template;
use value::{Facts, Host};

/// Logs of the control plane: each has a file and a thread.
const LEARNED_MAX: usize = 64;
/// Replaced logs whose writers may still be at work; one more waits for the oldest.
const LEAVING_MAX: usize = 16;

/// What [`AccessLogFormat::Default`] stands for.
const DEFAULT_FORMAT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% \
     %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \
     \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\"";

/// Whether a log with this format can be opened; the error names the operator.
pub fn check(format: &AccessLogFormat) -> Result<(), LogError> {
    template(format).map(drop)
}

fn template(format: &AccessLogFormat) -> Result<Template, LogError> {
    let template = match format {
        AccessLogFormat::Default => Template::text(DEFAULT_FORMAT),
        AccessLogFormat::Text(text) => Template::text(text),
        AccessLogFormat::Json(map) => Template::json(map),
    };
    template.map_err(LogError::Format)
}

/// The access logs of the process.
#[derive(Debug)]
pub struct AccessLogs {
    /// Of flags: they hold whatever the control plane says.
    fixed: Vec<Writer>,
    /// Of the control plane.
    learned: Vec<Writer>,
    /// Replaced, and not yet written out.
    leaving: Vec<Spool>,
    reopener: Reopener,
    host: Host,
    /// Connections seen: `%CONNECTION_ID%`.
    connections: u64,
    /// What the leaving ones have done before they were gone.
    gone: Counts,
}

/// One open log.
#[derive(Debug)]
struct Writer {
    target: LogTarget,
    format: AccessLogFormat,
    /// What it takes of connections that a listener wanted.
    matched: Takes,
    /// What it takes of those that none did (NR).
    unmatched: Takes,
    template: Template,
    spool: Spool,
    /// Reused for each line.
    line: Vec<u8>,
}

/// Whose connections a log takes.
#[derive(Debug, Default)]
enum Takes {
    #[default]
    None,
    /// As [`AccessLog::only`].
    Of(BTreeSet<Logged>),
    All,
}

impl Takes {
    fn add(&mut self, only: Option<&BTreeSet<Logged>>) {
        match (&mut *self, only) {
            (Self::All, _) => {}
            (_, None) => *self = Self::All,
            (Self::None, Some(listeners)) => *self = Self::Of(listeners.clone()),
            (Self::Of(known), Some(listeners)) => known.extend(listeners.iter().cloned()),
        }
    }

    fn takes(&self, record: &ConnectionRecord) -> bool {
        match self {
            Self::None => false,
            Self::Of(listeners) => listeners.iter().any(|of| {
                of.upstream.as_deref() == record.upstream.as_deref()
                    && of.service.as_ref().is_none_or(|service| **service == *record.service)
            }),
            Self::All => true,
        }
    }
}

impl AccessLogs {
    /// Opens the logs that flags ask for. With none, the control plane's are taken ([`Self::learn`]).
    pub fn open(settings: &[AccessLog], reopener: &Reopener) -> Result<Self, LogError> {
        let mut logs = Self {
            fixed: Vec::new(),
            learned: Vec::new(),
            leaving: Vec::new(),
            reopener: reopener.clone(),
            host: Host::read(),
            connections: 0,
            gone: Counts::default(),
        };
        for setting in settings {
            add(&mut logs.fixed, setting, &logs.reopener)?;
        }
        Ok(logs)
    }

    /// Takes the control plane's logs instead of those that it gave before. One that cannot be opened is said and left
    /// out; those that stay the same go on in the same file.
    pub fn learn(&mut self, settings: &[AccessLog]) {
        if !self.fixed.is_empty() {
            return;
        }
        let mut before = std::mem::take(&mut self.learned);
        let mut surplus = 0;
        for setting in settings {
            let same = |writer: &Writer| writer.target == setting.target && writer.format == setting.format;
            if let Some(at) = before.iter().position(same) {
                let writer = before.swap_remove(at);
                self.learned.push(Writer { matched: Takes::None, unmatched: Takes::None, ..writer });
            }
            if self.learned.len() >= LEARNED_MAX && !self.learned.iter().any(same) {
                surplus += 1;
                continue;
            }
            if let Err(error) = add(&mut self.learned, setting, &self.reopener) {
                let remedy = "correct it in Consul's proxy-defaults or in the listener, or set -access-log here";
                tracing::error!(%error, target = ?setting.target, remedy, "an access log is left out");
            }
        }
        if surplus > 0 {
            let remedy = "let listeners share targets and formats";
            tracing::error!(surplus, most = LEARNED_MAX, remedy, "more access logs than are kept: the last ones are left out");
        }
        self.leaving.extend(before.into_iter().map(|writer| writer.spool));
        while self.leaving.len() > LEAVING_MAX {
            let oldest = self.leaving.remove(0);
            self.gone = self.gone + oldest.close();
        }
    }

    /// Whether any log is open, and workers should find out what only an access log wants.
    pub fn are_on(&self) -> bool {
        self.writers().next().is_some()
    }

    fn writers(&self) -> impl Iterator<Item = &Writer> {
        self.fixed.iter().chain(&self.learned)
    }

    /// Takes one record.
    pub fn record(&mut self, record: &ConnectionRecord) {
        self.connections += 1;
        let facts = Facts::new(record, &self.host, self.connections, SystemTime::now());
        let unmatched = flags::is_unmatched(record);
        for writer in self.fixed.iter_mut().chain(&mut self.learned) {
            let takes = if unmatched { &writer.unmatched } else { &writer.matched };
            if takes.takes(record) {
                writer.line.clear();
                writer.template.write(&facts, &mut writer.line);
                writer.spool.push(&writer.line);
            }
        }
    }

    /// Hands lines to the writers. Call with every tick.
    pub fn flush(&mut self) {
        for writer in self.fixed.iter_mut().chain(&mut self.learned) {
            writer.spool.flush();
        }
        let gone = &mut self.gone;
        self.leaving.retain_mut(|spool| {
            let written_out = spool.retire();
            if written_out {
                *gone = *gone + spool.counts();
            }
            !written_out
        });
    }

    /// What became of the lines so far, over all logs.
    pub fn counts(&self) -> Counts {
        let open = self.writers().map(|writer| writer.spool.counts());
        open.chain(self.leaving.iter().map(Spool::counts)).fold(self.gone, |sum, counts| sum + counts)
    }
}

/// Opens a log, unless one with its target and format is among `writers`: then that takes this one's connections too.
fn add(writers: &mut Vec<Writer>, setting: &AccessLog, reopener: &Reopener) -> Result<(), LogError> {
    let template = template(&setting.format)?;
    let same = |writer: &&mut Writer| writer.target == setting.target && writer.format == setting.format;
    let writer = match writers.iter_mut().find(same) {
        Some(writer) => writer,
        None => {
            let spool = Spool::open(&Destination::from(&setting.target), reopener)?;
            if !spool.is_on() {
                return Ok(());
            }
            writers.push(Writer {
                target: setting.target.clone(),
                format: setting.format.clone(),
                matched: Takes::None,
                unmatched: Takes::None,
                template,
                spool,
                line: Vec::new(),
            });
            let last = writers.len() - 1;
            &mut writers[last]
        }
    };
    let takes = if setting.unmatched_only { &mut writer.unmatched } else { &mut writer.matched };
    takes.add(setting.only.as_ref());
    Ok(())
}

#[cfg(test)]
mod tests;
