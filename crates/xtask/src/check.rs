//! `cargo xtask test`: everything that CI checks of the code.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::{
    cache::Cache,
    models,
    packages::Registries,
    readme, setup,
    terminal::{self, Stage, say},
    workspace::Workspace,
};

const EMBED_PROMPTS: &str = r#"[{"instruction": "Name a river.", "input": ""}]"#;

/// What is asked for beyond the checks of every run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    /// Packages may be installed.
    pub(crate) yes: bool,
    /// The long tests.
    pub(crate) soak: bool,
    /// The tests under Slurm.
    pub(crate) slurm: bool,
}

/// Runs every check.
pub(crate) fn run(workspace: &Workspace, cache: &Cache, options: Options) -> Result<()> {
    let purpose = setup::Purpose::of_tests(options.slurm);
    stage("setup", || setup::run(workspace, cache, purpose, options.yes))?;
    let (model, tokenizers) = stage("model and tokenizers", || {
        let model = models::smollm2(workspace, cache, &Registries)?;
        let tokenizers = models::tokenizers(workspace, cache, &model, &Registries)?;
        Ok((model, tokenizers))
    })?;
    let mut variables =
        vec![("DROMEDARY_SMOLLM2", model.clone()), ("DROMEDARY_TOKENIZERS", tokenizers)];
    if options.soak {
        variables.push(("DROMEDARY_SOAK", PathBuf::from("1")));
    }
    stage("format", || terminal::run(&mut workspace.cargo(["fmt", "--all", "--check"])))?;
    stage("lints", || {
        let clippy = ["clippy", "--release", "--workspace", "--all-targets"];
        let deny = ["--", "-D", "warnings"];
        terminal::run(&mut workspace.cargo(clippy.iter().chain(&deny)))
    })?;
    stage("documentation", || {
        let mut doc = workspace.cargo(["doc", "--release", "--workspace", "--no-deps"]);
        terminal::run(doc.env("RUSTDOCFLAGS", "-D warnings"))
    })?;
    stage("build", || terminal::run(&mut workspace.cargo(["build", "--release", "--workspace"])))?;
    let mut count = stage("tests", || {
        let mut test = workspace.cargo(["test", "--release", "--workspace", "--no-fail-fast"]);
        test.envs(variables.iter().map(|(name, value)| (name, value)));
        run_tests(&mut test)
    })?;
    if options.slurm {
        // One after the other: each has a cluster of its own, on the same cores.
        let slurm = stage("tests under Slurm", || {
            let words = ["test", "--release", "--workspace", "--test", "slurm", "--"];
            run_tests(workspace.cargo(words).args(["--ignored", "--test-threads", "1"]))
        })?;
        count.passed += slurm.passed;
        count.ignored -= count.ignored.min(slurm.passed);
    }
    stage("examples/embed", || {
        let mut embed = workspace.cargo(["run", "--release"]);
        // From its folder, as a program that uses the crates from outside the workspace; the
        // target folder is shared, or libtorch's bindings would be built once more.
        embed.current_dir(workspace.root().join("examples/embed"));
        embed.env("CARGO_TARGET_DIR", workspace.target_dir()?);
        let prompts = tempfile::Builder::new().suffix(".json").tempfile()?;
        fs::write(prompts.path(), EMBED_PROMPTS)?;
        terminal::run(embed.arg("--").args([&model, prompts.path()]))
    })?;
    count.passed += stage("README commands", || readme::run(workspace, &model))?;
    say!("\nTests: {}", count.closing_line());
    Ok(())
}

fn stage<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let stage = Stage::start(name);
    let result = work().with_context(|| format!("{name} failed"))?;
    stage.end();
    Ok(result)
}

/// What the test programs counted.
#[derive(Debug, Default, PartialEq, Eq)]
struct Count {
    passed: usize,
    failed: usize,
    ignored: usize,
}

impl Count {
    /// Adds a closing line of a test program (`test result: ok. 3 passed; 0 failed; ...`).
    fn add(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else { return };
        let result = result.split_once(". ").map_or(result, |(_, counts)| counts);
        for part in result.split(';') {
            let mut words = part.split_whitespace();
            let Some(number) = words.next().and_then(|word| word.parse::<usize>().ok()) else {
                continue;
            };
            match words.next() {
                Some("passed") => self.passed += number,
                Some("failed") => self.failed += number,
                Some("ignored") => self.ignored += number,
                _ => {}
            }
        }
    }

    fn closing_line(&self) -> String {
        format!("{} passed, {} failed, {} skipped", self.passed, self.failed, self.ignored)
    }
}

/// Runs cargo test, passing its output on and counting in it.
fn run_tests(command: &mut Command) -> Result<Count> {
    say!("$ {}", terminal::shown(command));
    let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start cargo")?;
    let output = child.stdout.take().context("cargo has no output")?;
    let mut count = Count::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        count.add(&line);
        say!("{line}");
    }
    let status = child.wait()?;
    ensure!(status.success(), "{status}: cargo test ({})", count.closing_line());
    ensure!(count.passed > 0, "cargo test ran no test");
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_added_up() {
        let mut count = Count::default();
        for line in [
            "running 12 tests",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished",
            "test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out",
            "    test result: ok. 99 passed; (printed by a test)",
        ] {
            count.add(line);
        }
        assert_eq!(count, Count { passed: 14, failed: 3, ignored: 1 });
        assert_eq!(count.closing_line(), "14 passed, 3 failed, 1 skipped");
    }

    #[test]
    fn no_test_at_all_is_a_failure() {
        assert!(run_tests(Command::new("true").arg("test")).is_err());
        let mut one = Command::new("echo");
        one.arg("test result: ok. 1 passed; 0 failed");
        assert_eq!(run_tests(&mut one).unwrap().passed, 1);
    }
}
