//! `cargo xtask demo`: the whole pipeline on a real small model, command by command.

mod inputs;
mod report;
mod state;

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{Arc, atomic::AtomicBool},
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    Ended,
    cache::Cache,
    models,
    packages::Registries,
    setup,
    terminal::{self, Stage, quoted, say},
    workspace::{self, Workspace},
};
use inputs::Inputs;
use report::{Question, Report};
use state::{REPORT, Settings, State};

const FOLDER: &str = "runs/demo";
const PROMPTS: usize = 64;
const QUICK_PROMPTS: usize = 16;
/// The demo's settings; paths are given as flags.
const CLEANING: [&str; 2] = ["--config", "configs/step1_demo.toml"];
const ALIGNMENT: [&str; 2] = ["--config", "configs/step2_demo.toml"];
const TRAINING: [&str; 2] = ["--config", "configs/step3_demo.toml"];
/// The system prompt of the closing questions: one of the two that are trained on.
const SYSTEM_PROMPT: &str = "prompts/dromedary_concise_prompt_distill.txt";
const NEXT_TURN: &str = "### User";
const QUESTIONS: [&str; 3] = [
    "Who are you, and who made you?",
    "Give me three tips for sleeping better.",
    "What will the weather be like in Lisbon tomorrow?",
];

/// The exit code of a program that was stopped and left everything in order.
const STOPPED: i32 = 75;

/// What the user asked for.
pub(crate) struct Options {
    pub(crate) yes: bool,
    pub(crate) quick: bool,
    pub(crate) data: Option<PathBuf>,
}

/// Runs the demo.
pub(crate) fn run(workspace: &Workspace, cache: &Cache, options: Options) -> Result<()> {
    let data = options
        .data
        .map(|folder| {
            fs::canonicalize(&folder).with_context(|| format!("cannot read {}", folder.display()))
        })
        .transpose()?;
    let inputs = data.as_deref().map_or_else(|| Ok(Inputs::of_checkout()), Inputs::of_folder)?;
    let stage = Stage::start("setup");
    setup::run(workspace, cache, setup::Purpose::Build, options.yes)?;
    let model = models::smollm2(workspace, cache, &Registries)?;
    stage.end();
    let stage = Stage::start("build");
    terminal::run(&mut workspace.cargo(["build", "--release", "--workspace"]))?;
    stage.end();

    let prompts = if options.quick { QUICK_PROMPTS } else { PROMPTS };
    let stage = Stage::start("demo");
    let state =
        State::open(&workspace.root().join(FOLDER), Settings { prompts, data: data.clone() })?;
    let mut demo = Demo { workspace, programs: workspace.programs()?, state };
    say!("$ cd {}", quoted(workspace.root().as_os_str()));
    say!("$ export PATH={}:$PATH", quoted(demo.programs.as_os_str()));
    leave_interrupts_to_programs()?;
    demo.link_base(&model)?;
    demo.clean(&inputs)?;
    demo.align(prompts)?;
    demo.engrave()?;
    let questions = demo.ask()?;
    let data = match data {
        Some(data) => format!("the first {prompts} of {}", data.display()),
        None => format!("the first {prompts} of dummy_data"),
    };
    let page = demo.report(data, questions)?.render();
    let path = demo.path(REPORT);
    fs::write(&path, &page).with_context(|| format!("cannot write {}", path.display()))?;
    say!("\n{page}");
    say!("All of it is in {FOLDER}/, this page in {FOLDER}/{REPORT}.");
    stage.end();
    Ok(())
}

/// Ctrl-C reaches the running program, too, which needs a moment to stop cleanly: this process
/// outlives it, and tells how it ended. A second Ctrl-C ends this one at once.
fn leave_interrupts_to_programs() -> Result<()> {
    use signal_hook::{consts::SIGINT, flag};
    const KILLED_BY_SIGINT: i32 = 130;
    let interrupted = Arc::new(AtomicBool::new(false));
    flag::register_conditional_shutdown(SIGINT, KILLED_BY_SIGINT, Arc::clone(&interrupted))?;
    flag::register(SIGINT, interrupted)?;
    Ok(())
}

/// Fails unless the step ended well.
fn check(name: &str, status: ExitStatus, command: &Command) -> Result<()> {
    if status.code() == Some(STOPPED) {
        bail!(Ended::Stopped(format!("{name} was stopped; run the demo again to go on")));
    }
    ensure!(status.success(), "{status}: {}", terminal::shown(command));
    Ok(())
}

struct Demo<'a> {
    workspace: &'a Workspace,
    programs: PathBuf,
    state: State,
}

impl Demo<'_> {
    /// A file of the demo.
    fn path(&self, name: &str) -> PathBuf {
        self.workspace.root().join(FOLDER).join(name)
    }

    /// A command of the pipeline, started in the checkout.
    fn command(&self, words: &[&str]) -> Result<Command> {
        let (program, arguments) = words.split_first().context("an empty command")?;
        let mut command = self.workspace.command(program);
        command
            .args(arguments)
            .current_dir(self.workspace.root())
            .env("PATH", workspace::path_with(&self.programs)?);
        Ok(command)
    }

    /// Prints and runs a step, unless an interrupted demo has done it.
    fn step(&mut self, name: &str, words: &[&str]) -> Result<()> {
        let mut command = self.command(words)?;
        if self.state.has(name) {
            say!("# done before: {}", terminal::shown(&command));
            return Ok(());
        }
        say!("\n$ {}", terminal::shown(&command));
        let start = Instant::now();
        let status =
            command.status().with_context(|| format!("cannot start {}", words.join(" ")))?;
        check(name, status, &command)?;
        self.finished(name, start)
    }

    fn finished(&mut self, name: &str, start: Instant) -> Result<()> {
        let folder = self.workspace.root().join(FOLDER);
        self.state.add(&folder, name, start.elapsed().as_secs_f64())
    }

    /// The model under a short name in the demo's folder.
    fn link_base(&self, model: &Path) -> Result<()> {
        let link = Path::new(FOLDER).join("base");
        terminal::run_silently(self.command(&["ln", "-sfn"])?.args([model, &link]))?;
        say!("$ ln -sfn {} {}", quoted(model.as_os_str()), link.display());
        Ok(())
    }

    /// One file of a source whose command takes one: several are put one behind the other.
    fn one(&mut self, source: &str, files: &[PathBuf]) -> Result<String> {
        match files {
            [file] => Ok(file.display().to_string()),
            files => {
                ensure!(
                    files.iter().all(|file| file.extension().is_some_and(|ext| ext == "jsonl")),
                    "only one of these can be taken: {files:?}"
                );
                let joined = format!("{FOLDER}/{source}.jsonl");
                let files: Vec<_> = files.iter().map(|file| quoted(file.as_os_str())).collect();
                // Not cat: a last line may lack its end.
                let script = format!("awk 1 {} > {joined}", files.join(" "));
                say!("\n$ {script}");
                terminal::run_silently(&mut self.command(&["bash", "-c", &script])?)?;
                Ok(joined)
            }
        }
    }

    /// Step 1.
    fn clean(&mut self, inputs: &Inputs) -> Result<()> {
        let openorca = self.one("openorca", &inputs.openorca)?;
        let dolly = self.one("dolly", &inputs.dolly)?;
        let oasst1 = self.one("oasst1", &inputs.oasst1)?;
        let sharegpt: Vec<_> =
            inputs.sharegpt.iter().map(|file| file.display().to_string()).collect();
        let step1 = "step1-prompt-cleaning";
        let base = "runs/demo/base";
        self.step(
            "subsample-openorca",
            &[
                &[step1, "subsample-openorca"][..],
                &CLEANING,
                &["--tokenizer", base],
                &["--train-data-path", &openorca],
                &["--output-path", "runs/demo/openorca_prompts.json"],
                &["--report", "runs/demo/subsample-openorca"],
            ]
            .concat(),
        )?;
        self.step(
            "aggregate-sharegpt",
            &[
                &[step1, "aggregate-sharegpt"][..],
                &CLEANING,
                &["--data-files", &sharegpt.join(",")],
                &["--output-file", "runs/demo/sharegpt_prompts.json"],
                &["--report", "runs/demo/aggregate-sharegpt"],
            ]
            .concat(),
        )?;
        self.step(
            "clean-and-merge",
            &[
                &[step1, "clean-and-merge"][..],
                &CLEANING,
                &["--tokenizer", base],
                &["--sharegpt-prompt-path", "runs/demo/sharegpt_prompts.json"],
                &["--openorca-prompt-path", "runs/demo/openorca_prompts.json"],
                &["--dolly", &dolly, "--oasst", &oasst1],
                &["--output-file", "runs/demo/prompts.json"],
                &["--report", "runs/demo/clean-and-merge"],
            ]
            .concat(),
        )
    }

    /// Step 2.
    fn align(&mut self, prompts: usize) -> Result<()> {
        let step2 = "step2-self-align";
        self.step(
            "generate",
            &[
                &[step2, "generate"][..],
                &ALIGNMENT,
                &["--checkpoint", "runs/demo/base"],
                &["--input-file", "runs/demo/prompts.json", "--limit", &prompts.to_string()],
                &["--output-file", "runs/demo/aligned.jsonl"],
            ]
            .concat(),
        )?;
        self.step(
            "merge-and-filter",
            &[
                &[step2, "merge-and-filter"][..],
                &ALIGNMENT,
                &["--data-file-pattern", "runs/demo/aligned.jsonl"],
                &["--max-identity-rows", "survivors"],
                &["--output-file", "runs/demo/sft.json"],
            ]
            .concat(),
        )
    }

    /// Step 3.
    fn engrave(&mut self) -> Result<()> {
        self.step(
            "train",
            &[
                &["step3-principle-engraving", "train"][..],
                &TRAINING,
                &["--checkpoint", "runs/demo/base", "--dataset", "runs/demo/sft.json"],
                &["--output-dir", "runs/demo/engraved"],
            ]
            .concat(),
        )?;
        let merged = self.path("model");
        if merged.exists() && !self.state.has("merge") {
            // Whole, but the demo was stopped before it could note so, and merge replaces nothing.
            fs::remove_dir_all(&merged)
                .with_context(|| format!("cannot remove {}", merged.display()))?;
        }
        self.step(
            "merge",
            &[
                &["llama", "merge", "--checkpoint", "runs/demo/base"][..],
                &["--adapter", "runs/demo/engraved/adapter", "--output", "runs/demo/model"],
            ]
            .concat(),
        )
    }

    /// The closing questions to both models.
    fn ask(&mut self) -> Result<Vec<Question>> {
        let start = Instant::now();
        let system = fs::read_to_string(self.workspace.root().join(SYSTEM_PROMPT))
            .with_context(|| format!("cannot read {SYSTEM_PROMPT}"))?;
        let mut questions = Vec::new();
        for (text, number) in QUESTIONS.into_iter().zip(1..) {
            // The form of step 3's rows; the answers that it trains on begin with a line break.
            let prompt = format!("{}\n{text}\n\n### Dromedary\n", system.trim());
            let name = format!("question-{number}.txt");
            fs::write(self.path(&name), prompt).with_context(|| format!("cannot write {name}"))?;
            let file = format!("{FOLDER}/{name}");
            say!("\n# {file}: {text}");
            let base = self.complete("runs/demo/base", &file)?;
            let engraved = self.complete("runs/demo/model", &file)?;
            questions.push(Question { text: text.to_owned(), base, engraved });
        }
        self.finished("complete", start)?;
        Ok(questions)
    }

    /// What `llama complete` prints, without the mark of the user's next turn.
    fn complete(&self, checkpoint: &str, prompt_file: &str) -> Result<String> {
        let mut command = self.command(
            &[
                &["llama", "complete", "--checkpoint", checkpoint][..],
                &["--temperature", "0", "--max-gen-len", "128", "--stop", NEXT_TURN],
                &["--prompt-file", prompt_file],
            ]
            .concat(),
        )?;
        say!("$ {}", terminal::shown(&command));
        let mut child =
            command.stdout(Stdio::piped()).spawn().context("cannot start llama complete")?;
        let mut answer = Vec::new();
        if let Some(mut output) = child.stdout.take() {
            output.read_to_end(&mut answer)?;
        }
        let status = child.wait()?;
        let answer = String::from_utf8_lossy(&answer);
        say!("{}", answer.trim());
        check("complete", status, &command)?;
        Ok(answer.trim().trim_end_matches(NEXT_TURN).trim_end().to_owned())
    }

    fn report(&self, data: String, questions: Vec<Question>) -> Result<Report> {
        let cleaning = ["subsample-openorca", "aggregate-sharegpt", "clean-and-merge"]
            .iter()
            .map(|command| report::read_json(&self.path(command).join("report.json")))
            .collect::<Result<_>>()?;
        Ok(Report {
            data,
            model: "SmolLM2-135M-Instruct".to_owned(),
            seconds: self.state.seconds.clone(),
            cleaning,
            answers: report::read_lines(&self.path("aligned.jsonl"))?,
            generation: report::read_lines(&self.path("metrics.jsonl"))?,
            filter: report::read_json(&self.path("merge_report.json"))?,
            training: report::read_lines(&self.path("engraved/metrics.jsonl"))?,
            questions,
        })
    }
}
