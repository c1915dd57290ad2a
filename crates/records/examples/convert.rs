//! `convert IN OUT`: copies rows between arrays and lines, plain, `.gz` and `.zst`.
//!
//! Bad rows are reported and left out; nothing appears where the input is cut off.

use std::process::ExitCode;

use dromedary_records::{Error, RowWriter, read_rows};
use serde_json::{Map, Value};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let [_, input, output] = &args[..] else {
        eprintln!("usage: convert IN OUT");
        return ExitCode::from(2);
    };
    match convert(input, output) {
        Ok((rows, bad)) => {
            eprintln!("{rows} rows written, {bad} bad rows left out");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            eprintln!("error: {error}{}", cause.unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}

fn convert(input: &str, output: &str) -> Result<(u64, u64), Error> {
    let mut writer = RowWriter::create(output)?;
    let mut bad = 0;
    for row in read_rows::<Map<String, Value>>(input)? {
        match row {
            Ok(row) => writer.write(&row)?,
            Err(error) if error.is_bad_row() => {
                eprintln!("{error}");
                bad += 1;
            }
            Err(error) => return Err(error),
        }
    }
    Ok((writer.finish()?, bad))
}
