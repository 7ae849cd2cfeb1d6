//! argv -> command -> exit code. Everything else is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    ringfence::app::abort_on_panic();
    let environment = ringfence::cli::Environment::of_process();
    let mut arguments = std::env::args_os();
    let program = arguments.next().unwrap_or_else(|| "ringfence".into());
    ringfence::cli::run(&program, arguments, &environment).into()
}
