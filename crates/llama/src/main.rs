//! The program `llama`.

use std::process::ExitCode;

fn main() -> ExitCode {
    dromedary_llama::cli::main()
}
