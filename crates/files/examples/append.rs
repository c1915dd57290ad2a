//! `append FILE COUNT`: appends numbered rows behind those that are there, under a lock.

use std::process::ExitCode;

use dromedary_files::{Error, JsonlAppender, Lock, LockOptions};
use serde::Serialize;

#[derive(Serialize)]
struct Row {
    id: u64,
    text: String,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let [_, path, count] = &args[..] else {
        eprintln!("usage: append FILE COUNT");
        return ExitCode::from(2);
    };
    match count.parse().map_err(|_| "COUNT must be a number".to_owned()).and_then(|count| {
        append(path, count).map_err(|error| match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        })
    }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn append(path: &str, count: u64) -> Result<(), Error> {
    let lock = Lock::acquire(path, &LockOptions::from_env(false))?;
    let (mut rows, recovered) = JsonlAppender::open(path)?;
    if recovered.cut_bytes > 0 {
        eprintln!("cut {} bytes of a torn row", recovered.cut_bytes);
    }
    for id in recovered.lines + 1..=count {
        lock.check()?;
        rows.append(&Row { id, text: "x".repeat(100) })?;
    }
    rows.sync()
}
