//! `test` with a cargo that only notes what it was asked for.

use std::{fs, path::Path, process::Output};

use crate::machine::{Machine, errors};

/// A machine whose cargo succeeds, and says that tests ran.
fn built() -> Machine {
    let machine = Machine::ready();
    machine.model();
    for name in ["llama.json", "mistral.json", "mistral.model", "smollm2.json"] {
        machine.file(&format!("cache/tokenizers/{name}"));
    }
    for folder in ["configs", "dummy_data", "prompts", "examples/embed"] {
        machine.file(&format!("checkout/{folder}/file"));
    }
    let metadata = format!(r#"{{"target_directory": "{}"}}"#, machine.path("target").display());
    machine.program(
        "cargo",
        &format!(
            r#"[ "$1" = metadata ] && echo '{metadata}' && exit
               [ "$1" = --version ] && exit
               echo "$1 soak=$DROMEDARY_SOAK ${{DROMEDARY_SMOLLM2##*/}} ${{DROMEDARY_TOKENIZERS##*/}}" >> {calls}
               [ "$1" = "$FAILS" ] && exit 101
               [ "$1" != test ] || echo "test result: ok. 41 passed; 0 failed; 0 ignored""#,
            calls = machine.calls()
        ),
    );
    machine.program("npm", "exit 0");
    machine.program("../target/release/llama", "echo \"llama $* in $(ls | tr '\\n' ' ')\"");
    let readme = "```sh ci\nllama inspect \"$(basename $MODEL)\"\n```\n```sh\nfalse\n```\n";
    fs::write(machine.path("checkout/README.md"), readme).unwrap();
    machine
}

fn test(machine: &Machine, arguments: &[&str], fails: &str) -> Output {
    let path = format!("{}:/usr/bin:/bin", machine.path("bin").display());
    let variables = [("PATH", Path::new(&path)), ("FAILS", Path::new(fails))];
    machine.xtask(&[&["test"], arguments].concat(), &variables)
}

#[test]
fn every_check_is_run_and_counted() {
    let machine = built();
    let output = test(&machine, &["--yes"], "");
    assert!(output.status.success(), "{}", errors(&output));
    let model = "smollm2-135m-instruct tokenizers";
    let expected = format!(
        "fmt soak=  \nclippy soak=  \ndoc soak=  \nbuild soak=  \ntest soak= {model}\nrun soak=  \n"
    );
    assert_eq!(machine.called(), expected);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("llama inspect smollm2-135m-instruct in configs dummy_data prompts"));
    assert!(text.ends_with("\nTests: 42 passed, 0 failed, 0 skipped\n"), "{text}");
}

#[test]
fn soak_reaches_the_tests() {
    let machine = built();
    assert!(test(&machine, &["--soak"], "").status.success());
    assert!(machine.called().contains("test soak=1"), "{}", machine.called());
}

#[test]
fn slurm_is_installed_and_its_tests_are_run_behind_the_others() {
    let machine = built();
    let script = format!(
        "echo \"apt-get $*\" >> {calls}; [ $1 = update ] || for name in munged sbatch slurmctld slurmd; \
         do echo 'exit 0' > {bin}/$name; /bin/chmod +x {bin}/$name; done; exit 0",
        calls = machine.calls(),
        bin = machine.path("bin").display()
    );
    machine.program("apt-get", &script);
    machine.program("sudo", "[ $1 = -n ] && shift; exec \"$@\"");
    let already = Path::new("/usr/sbin/slurmctld").exists();
    let install = "--no-install-recommends munge slurm-wlm slurm-wlm-basic-plugins";
    if !already {
        let output = test(&machine, &["--slurm"], "");
        assert_eq!(output.status.code(), Some(2));
        assert!(errors(&output).contains(install), "{}", errors(&output));
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains("starts munge.service"), "{said}");
        assert_eq!(machine.called(), "");
    }
    let output = test(&machine, &["--yes", "--slurm"], "");
    assert!(output.status.success(), "{}", errors(&output));
    let called = machine.called();
    assert_eq!(called.contains(install), !already, "{called}");
    assert_eq!(called.matches("\ntest ").count(), 2, "{called}");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("--test slurm -- --ignored --test-threads 1"), "{text}");
    assert!(text.ends_with("\nTests: 83 passed, 0 failed, 0 skipped\n"), "{text}");
}

#[test]
fn the_first_failing_check_ends_the_run() {
    for (fails, name) in [
        ("fmt", "format failed"),
        ("clippy", "lints failed"),
        ("doc", "documentation failed"),
        ("build", "build failed"),
        ("test", "tests failed"),
        ("run", "examples/embed failed"),
    ] {
        let machine = built();
        let output = test(&machine, &[], fails);
        assert_eq!(output.status.code(), Some(1));
        assert!(errors(&output).contains(name), "{fails}: {}", errors(&output));
        assert!(machine.called().lines().last().unwrap().starts_with(fails));
    }
}

#[test]
fn failing_commands_of_the_readme_are_named_by_their_line() {
    let machine = built();
    fs::write(machine.path("checkout/README.md"), "a\n```sh ci\nllama x\nfalse\n```\n").unwrap();
    let output = test(&machine, &[], "");
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("README.md:3"), "{}", errors(&output));
    fs::write(machine.path("checkout/README.md"), "no commands\n").unwrap();
    let output = test(&machine, &[], "");
    assert!(errors(&output).contains("no block marked `sh ci`"), "{}", errors(&output));
}
