//! Exit codes, flags and signals of a whole program.

use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

fn greet(args: &[&str]) -> Command {
    // Cargo puts examples beside the folder of the test programs.
    let deps = std::env::current_exe().unwrap();
    let program: PathBuf = deps.ancestors().nth(2).unwrap().join("examples/greet");
    assert!(program.exists(), "{} is built by a plain cargo test", program.display());
    let mut command = Command::new(program);
    command.args(args).env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

fn output(args: &[&str]) -> (Output, String) {
    let output = greet(args).output().unwrap();
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    (output, stderr)
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Starts a run and waits until its handlers are in place.
fn started(times: &str, pause_ms: &str) -> Child {
    let mut child = greet(&["greet", "--user-name=Ada"])
        .args(["--num-times", times, "--pause-ms", pause_ms])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    read_until(&mut child, "hello Ada");
    child
}

/// Reads stderr up to this text.
fn read_until(child: &mut Child, text: &str) {
    let stderr = child.stderr.as_mut().unwrap();
    let mut seen = Vec::new();
    let mut byte = [0];
    while !seen.ends_with(text.as_bytes()) {
        assert_eq!(stderr.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
}

fn rest(child: Child) -> (Output, String) {
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    (output, stderr)
}

#[test]
fn flags_in_snake_case_and_in_kebab_case() {
    for args in [["greet", "--user_name=A_b"].as_slice(), &["greet", "--user-name", "A_b"]] {
        let (output, stderr) = output(args);
        assert_eq!(output.status.code(), Some(0), "{stderr}");
        assert!(stderr.contains("hello A_b"), "{stderr}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_variable_has_the_users_value_or_else_the_programs() {
    // All other tests run the program without the variable, so that it starts anew in its own place.
    let said = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let args = ["greet", "--user-name", "A  b"];
    assert!(said(greet(&args).env_remove("GREETING")).contains("hello A  b"));
    assert!(said(greet(&args).env("GREETING", "salve")).contains("salve A  b"));
}

#[test]
fn wrong_usage_exits_with_2() {
    for args in [["greet", "--user_nam=x"].as_slice(), &["greet"], &["greet", "--config=/none"]] {
        let (output, stderr) = output(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.starts_with("error: "), "{args:?}: {stderr}");
    }
    let (_, stderr) = output(&["greet"]);
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
    assert!(stderr.contains("--user-name is required"), "{stderr}");
}

#[test]
fn a_printed_configuration_is_a_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("greet.toml");
    let (first, _) = output(&["greet", "--user_name=Ada", "--num_times=2", "--print_config"]);
    fs::write(&file, &first.stdout).unwrap();
    let config = format!("--config={}", file.display());
    let (second, _) = output(&["greet", &config, "--num-times=3", "--print-config"]);
    assert_eq!(
        String::from_utf8(second.stdout).unwrap(),
        String::from_utf8(first.stdout).unwrap().replace('2', "3")
    );
}

#[test]
fn an_unknown_key_names_file_and_key() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("greet.toml");
    fs::write(&file, "[greet]\nuser_nmae = 'x'\n").unwrap();
    let (output, stderr) = output(&["--config", file.to_str().unwrap(), "greet"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr.contains("greet.toml: [greet]: unknown key user_nmae"), "{stderr}");
    assert!(stderr.contains("did you mean user_name?"), "{stderr}");
}

#[test]
fn quiet_is_quiet() {
    let (output, stderr) = output(&["greet", "--user-name=Ada", "-q"]);
    assert_eq!((output.status.code(), stderr.as_str()), (Some(0), ""));
}

#[test]
fn the_signals_stop_a_run_with_75() {
    for signal in [Signal::TERM, Signal::INT, Signal::USR1] {
        let child = started("1000", "50");
        send(&child, signal);
        let (output, stderr) = rest(child);
        assert_eq!(output.status.code(), Some(75), "{signal:?}: {stderr}");
        assert!(stderr.contains("\ngreeting Ada: stopped: "), "{stderr}");
    }
}

#[test]
fn a_second_ctrl_c_ends_the_run_by_the_signal() {
    let mut child = started("2", "60000");
    send(&child, Signal::INT);
    // Two pending signals of a kind are one: wait for the first to be taken.
    read_until(&mut child, "again to end at once");
    send(&child, Signal::INT);
    let (output, stderr) = rest(child);
    assert_eq!(output.status.signal(), Some(Signal::INT.as_raw()), "{stderr}");
}

#[test]
fn a_limit_of_the_file_size_is_an_error_and_not_a_signal() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("out.toml");
    let program = greet(&[]).get_program().to_owned();
    let output = Command::new("sh")
        .args(["-c", "ulimit -f 0; exec \"$0\" greet --user-name=Ada --print-config > \"$1\""])
        .args([program, file.into_os_string()])
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cannot print the configuration: File too large"), "{stderr}");
}
