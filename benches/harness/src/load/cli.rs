//! The command line of `bench-load`: parsed once, with every default and bound in sight.
//!
//! Invariant: a parsed command can be run; what a shape ignores is said on standard error instead of being silently dropped.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::wire::PAYLOAD_BYTES_MAX;

const EXAMPLES: &str = "\
Examples:
  bench-load serve --bind 127.0.0.1:21000
  bench-load run request --to 127.0.0.1:21000 --connections 50 --rate 5000 --seconds 10
  bench-load run bulk --to 127.0.0.1:21000 --connections 8 --direction down --json bulk.json
  bench-load run storm --to 127.0.0.1:21000 --denied 127.0.0.1:21001";

const RUN_EXAMPLES: &str = "\
Shapes (defaults of --connections and --rate in brackets):
  request      keep-alive request and response [50; closed loop]
  connect      a new connection for each message; latency is to the first byte of the answer [32 slots; closed loop]
  meta-churn   connect, 15 round trips of about 100 B, close; --rate in connections/s [16 slots; closed loop]
  exec-api     connect, 6 requests (1 in 20 with 1 MB), a heartbeat every 5 s, reconnect; --rate in connections/s [32; one per 5 s each]
  sql-small    connect, 3 round trips, close; --rate in connections/s [64 slots; 200/s]
  bulk         22 MB down and 19.5 MB up in turn, in parallel [1; closed loop]
  idle-haul    a random tenth sends a tiny message a second, all answer at the end; --rate in messages/s [2000; 1/s for each of the tenth]
  storm        tasks that start evenly within 2 s: connect, 3 round trips; latency is to the first byte [300]
  hold         opens all, prints `ready`, waits for a line on standard input, then all must answer again [1000]
  slow-reader  one 64 MB answer read slowly beside small messages [50; 1000/s]
  fairness     16 MB messages beside small ones [50; 1000/s]

With a rate the loop is open: latency counts from when a message was due, however late it went out. Messages still unsent
--timeout-s after the end count as timeouts. Above some 10000 connections a second to one address the kernel's search for a free
port, half of the ephemeral range, shows in the latency: name more addresses with --to.
Sizes are of payloads; each message has 16 bytes of header besides.

The result is one JSON object. `connect_us` is the TCP connect, `first_answer_us` the time from the due start of a connection to
the first byte of its first answer, both null if the shape opened none. `failures` counts connect, reset, eof, mismatch, timeout
and denied_answered. The exit code is 0 whatever failed, and not 0 only if the run could not take place.

Examples:
  bench-load run request --to 127.0.0.1:21000 --rate 5000 --request-bytes 100 --response-bytes 1000
  bench-load run sql-small --to 127.0.0.1:21001,127.0.0.1:21002 --rate 200 --seconds 30
  bench-load run hold --to 127.0.0.1:21000 --connections 2000";

/// Load generator of ringfence's benchmarks: every payload byte is checked on both sides.
#[derive(Debug, Parser)]
#[command(name = "bench-load", version, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answer requests of every shape until SIGTERM; prints `ready` once it listens
    #[command(after_help = "Examples:\n  bench-load serve --bind 127.0.0.1:21000 --bind 127.0.0.1:21001")]
    Serve {
        /// Address to listen on; may be repeated
        #[arg(long, required = true, value_delimiter = ',')]
        bind: Vec<SocketAddr>,
    },
    /// Put load of one shape on a server and print a JSON object
    #[command(after_help = RUN_EXAMPLES)]
    Run(Box<Plan>),
}

/// One run.
#[derive(Debug, Args)]
pub(crate) struct Plan {
    /// What the load looks like
    pub(crate) shape: Shape,
    /// Where to connect to; connections go round robin over the addresses
    #[arg(long, required = true, value_delimiter = ',', value_name = "ADDR,..")]
    pub(crate) to: Vec<SocketAddr>,
    /// How long messages are due
    #[arg(long, default_value_t = 10.0, value_name = "S", value_parser = positive)]
    pub(crate) seconds: f64,
    /// Open loop at this rate a second over all connections
    #[arg(long, value_name = "R", value_parser = positive)]
    pub(crate) rate: Option<f64>,
    /// Connections, slots or tasks, as the shape has it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) connections: Option<u32>,
    /// Payload of a request (request, connect, fairness, slow-reader)
    #[arg(long, default_value_t = 100, value_name = "B", value_parser = payload())]
    pub(crate) request_bytes: u32,
    /// Payload of an answer (request, connect, fairness, slow-reader)
    #[arg(long, default_value_t = 100, value_name = "B", value_parser = payload())]
    pub(crate) response_bytes: u32,
    /// Makes the random choices and the payloads repeatable
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) seed: u64,
    /// Write the result here instead of to standard output
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// How long a connect, a read or a write may make no progress
    #[arg(long, default_value_t = 10.0, value_name = "S", value_parser = positive)]
    pub(crate) timeout_s: f64,
    /// Which way the payload goes (bulk)
    #[arg(long, value_enum, default_value_t = Direction::Both)]
    pub(crate) direction: Direction,
    /// Addresses that must not answer; every tenth task goes there (storm)
    #[arg(long, value_delimiter = ',', value_name = "ADDR,..")]
    pub(crate) denied: Vec<SocketAddr>,
    /// How fast the slow one reads at most (slow-reader)
    #[arg(long, default_value_t = 256 * 1024, value_name = "B", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) slow_bytes_per_s: u32,
    /// Connections that move 16 MB messages (fairness)
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1_000))]
    pub(crate) bulk: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shape {
    Request,
    Connect,
    MetaChurn,
    ExecApi,
    SqlSmall,
    Bulk,
    IdleHaul,
    Storm,
    Hold,
    SlowReader,
    Fairness,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Direction {
    Down,
    Up,
    Both,
}

impl Plan {
    /// `--connections`, or the shape's own number.
    pub(crate) fn connections(&self) -> usize {
        self.connections.map_or_else(|| self.shape.connections_default(), |connections| connections as usize)
    }

    /// The rate of the open loop, if the loop is open.
    pub(crate) fn rate_per_s(&self) -> Option<f64> {
        let default = match self.shape {
            Shape::SqlSmall => Some(200.0),
            Shape::SlowReader | Shape::Fairness => Some(1_000.0),
            Shape::ExecApi => Some(self.connections() as f64 / crate::shapes::HEARTBEAT_S),
            Shape::IdleHaul => Some(self.connections().div_ceil(crate::shapes::IDLE_BUSY_ONE_IN) as f64),
            _ => None,
        };
        if self.shape.is_paced_by_rate() { self.rate.or(default) } else { None }
    }

    /// Options given that the shape has no use for.
    pub(crate) fn ignored(&self) -> Vec<&'static str> {
        let shape = self.shape;
        let mut ignored = Vec::new();
        if self.rate.is_some() && !shape.is_paced_by_rate() {
            ignored.push("--rate");
        }
        if self.direction != Direction::Both && shape != Shape::Bulk {
            ignored.push("--direction");
        }
        if !self.denied.is_empty() && shape != Shape::Storm {
            ignored.push("--denied");
        }
        ignored
    }
}

impl Shape {
    /// The shape's name on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    fn connections_default(self) -> usize {
        match self {
            Self::Request | Self::SlowReader | Self::Fairness => 50,
            Self::Connect | Self::ExecApi => 32,
            Self::MetaChurn => 16,
            Self::SqlSmall => 64,
            Self::Bulk => 1,
            Self::IdleHaul => 2_000,
            Self::Storm => 300,
            Self::Hold => 1_000,
        }
    }

    fn is_paced_by_rate(self) -> bool {
        !matches!(self, Self::Bulk | Self::Storm | Self::Hold)
    }
}

fn payload() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(0..=i64::from(PAYLOAD_BYTES_MAX))
}

/// Rates and times: above 0 and at most a million, so that no schedule overflows.
fn positive(text: &str) -> Result<f64, String> {
    const MAX: f64 = 1_000_000.0;
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= MAX => Ok(value),
        _ => Err(format!("{text:?} is not a number above 0 and at most {MAX}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn plan(words: &str) -> Plan {
        let words = format!("bench-load run {words} --to 127.0.0.1:1");
        match Cli::try_parse_from(words.split(' ')).unwrap().command {
            Command::Run(plan) => *plan,
            Command::Serve { .. } => unreachable!("a run was asked for"),
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_are_the_shapes_own() {
        assert_eq!(plan("idle-haul").rate_per_s(), Some(200.0));
        assert_eq!(plan("exec-api --connections 256").rate_per_s(), Some(51.2));
        assert_eq!(plan("request").rate_per_s(), None);
        assert_eq!(plan("bulk --rate 5").rate_per_s(), None);
        assert_eq!(plan("bulk --rate 5").ignored(), ["--rate"]);
        assert_eq!(plan("storm --connections 7").connections(), 7);
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for words in ["request --rate 0", "request --rate NaN", "request --seconds inf", "request --request-bytes 67108865"] {
            let words = format!("bench-load run {words} --to 127.0.0.1:1");
            assert!(Cli::try_parse_from(words.split(' ')).is_err(), "{words}");
        }
    }
}
