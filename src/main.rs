//! argv -> command -> exit code. Everything else is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    ringfence::app::abort_on_panic();
    let environment = ringfence::cli::Environment::of_process();
    let arguments = std::env::args_os().skip(1);
    ringfence::cli::run(arguments, &environment).into()
}
