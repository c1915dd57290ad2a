//! Tools that write checkpoints, stopped, killed and out of room: nothing looks finished.

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use dromedary_llama::Checkpoint;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tempfile::TempDir;

use crate::{
    adapter,
    tiny::{self, Tiny},
};

/// Flags of each tool beside --checkpoint and --output.
fn tools(adapter: &Path) -> [Vec<&str>; 4] {
    [
        vec!["convert", "--num-shards", "2"],
        vec!["shard", "--tp", "3"],
        vec!["quantize", "--nf4"],
        vec!["merge", "--adapter", adapter.to_str().unwrap()],
    ]
}

/// A checkpoint that takes long enough to be interrupted: 100 MB.
fn base() -> Tiny {
    let mut config = tiny::config();
    for (key, value) in [
        ("hidden_size", 960),
        ("num_attention_heads", 16),
        ("num_key_value_heads", 8),
        ("head_dim", 60),
        ("intermediate_size", 3000),
        ("vocab_size", 1000),
    ] {
        config[key] = json!(value);
    }
    Tiny::of(config, 61).single()
}

fn start(flags: &[&str], from: &Path, to: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_llama"))
        .args(flags)
        .arg("--checkpoint")
        .arg(from)
        .arg("--output")
        .arg(to)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What is written, in a folder of its own.
const OUTPUT: &str = "x";

/// A tool that gets a signal while it writes weights, and the folder that it writes to.
fn interrupted(flags: &[&str], base: &Path, signal: Signal) -> (TempDir, Output) {
    let attempt = || {
        let out = tempfile::tempdir().unwrap();
        let child = start(flags, base, &out.path().join(OUTPUT));
        wait_for_weights(out.path());
        kill_process(Pid::from_child(&child), signal).unwrap();
        (out, child.wait_with_output().unwrap())
    };
    // On a busy machine it may have written all before the signal comes; then once more.
    let found = (0..20).map(|_| attempt()).find(|(_, output)| !output.status.success());
    found.expect("a signal that comes in time")
}

/// Waits until a file with weights is being written.
fn wait_for_weights(folder: &Path) {
    let deadline = Instant::now() + Duration::from_secs(120);
    let large = |path: &Path| {
        fs::read_dir(path).is_ok_and(|mut files| {
            files.any(|file| file.is_ok_and(|f| f.metadata().is_ok_and(|m| m.len() > 2_000_000)))
        })
    };
    while !fs::read_dir(folder).unwrap().any(|entry| large(&entry.unwrap().path())) {
        assert!(Instant::now() < deadline, "nothing is being written");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_stopped_or_killed_tool_leaves_nothing_that_looks_finished() {
    let base = base();
    let adapter = base.path().join("adapter");
    adapter::random(&base, 4, 5).save(&adapter).unwrap();
    for flags in tools(&adapter) {
        for (signal, number) in [(Signal::TERM, None), (Signal::KILL, Some(9))] {
            let (out, output) = interrupted(&flags, base.path(), signal);
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.signal(), number, "{flags:?}: {said}");
            assert!(!out.path().join(OUTPUT).exists(), "{flags:?}");
            if number.is_none() {
                assert_eq!(output.status.code(), Some(75), "{flags:?}: {said}");
                assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "{flags:?}");
            }
        }
        // What a killed run left behind is in nobody's way.
        let (out, _) = interrupted(&flags, base.path(), Signal::KILL);
        let to = out.path().join(OUTPUT);
        let done = start(&flags, base.path(), &to).wait_with_output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        dromedary_files::Manifest::read(&to).unwrap().verify(&to).unwrap();
    }
}

#[test]
fn a_full_disk_is_a_clean_error_of_every_tool() {
    let base = Tiny::of(
        {
            let mut config = tiny::config();
            for (key, value) in
                [("hidden_size", 24), ("num_key_value_heads", 6), ("intermediate_size", 22)]
            {
                config[key] = json!(value);
            }
            config["vocab_size"] = json!(300);
            config
        },
        62,
    )
    .single();
    let adapter = base.path().join("adapter");
    adapter::random(&base, 4, 5).save(&adapter).unwrap();
    let out = tempfile::tempdir().unwrap();
    for flags in tools(&adapter) {
        // Files may not grow beyond 8 blocks of 512 or 1024 bytes, as the shell has it.
        let script = "ulimit -f 8; program=\"$0\"; exec \"$program\" \"$@\"";
        let output = Command::new("sh")
            .args(["-c", script, env!("CARGO_BIN_EXE_llama")])
            .args(&flags)
            .arg("--checkpoint")
            .arg(base.path())
            .arg("--output")
            .arg(out.path().join("x"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{flags:?}: {said}");
        assert!(said.contains("/x/") && said.lines().count() == 1, "{flags:?}: {said}");
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "{flags:?}");
    }
    Checkpoint::open(base.path()).unwrap();
}
