//! The three commands of step 1 on files of a million rows, each in a process of its own.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use dromedary_prompt_cleaning::sources::OpenOrcaQuestion;
use dromedary_records::read_prompts;
use rand::{Rng, SeedableRng, rngs::StdRng};

/// OpenOrca's collections, and where the share of each ends in a hundred rows.
const COLLECTIONS: [&str; 4] = ["flan", "t0", "niv", "cot"];
const COLLECTION_ENDS: [u32; 3] = [55, 80, 94];
/// One of so many questions repeats an earlier one.
const REPEATS: u32 = 25;

/// Arguments of the bench.
#[derive(Args)]
pub(crate) struct Step1Args {
    /// tokenizer.json that measures lengths, or a folder with one.
    #[arg(long, env = "DROMEDARY_SMOLLM2", value_name = "PATH")]
    tokenizer: PathBuf,
    /// Questions of the OpenOrca file.
    #[arg(long, default_value_t = 1_000_000)]
    rows: usize,
    /// Megabytes of the generated ShareGPT array.
    #[arg(long, default_value_t = 320)]
    megabytes: usize,
    /// An OpenOrca file to measure in place of the generated one.
    #[arg(long, value_name = "FILE")]
    openorca: Option<PathBuf>,
    /// A ShareGPT file to measure in place of the generated one.
    #[arg(long, value_name = "FILE")]
    sharegpt: Option<PathBuf>,
    /// Runs of each command.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Threads of step 1 [default: one a core].
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Folder of the generated files, of a gigabyte, which stay there.
    #[arg(long, default_value = "target/bench-step1", value_name = "DIR")]
    folder: PathBuf,
}

pub(crate) fn run(args: &Step1Args) -> Result<()> {
    fs::create_dir_all(&args.folder)?;
    let texts = Texts::read()?;
    let openorca = match &args.openorca {
        Some(file) => file.clone(),
        None => texts.openorca(&args.folder, args.rows)?,
    };
    let sharegpt = match &args.sharegpt {
        Some(file) => file.clone(),
        None => texts.sharegpt(&args.folder, args.megabytes)?,
    };
    let output = |name: &str| args.folder.join(name);
    let (questions, openings) = (output("openorca_prompts.json"), output("sharegpt_prompts.json"));
    let all = usize::MAX.to_string();
    let rows = OpenOrcaQuestion::open(&openorca)?.count();
    println!("| what | best | all | peak |\n|---|---:|---|---|");
    let subsample = [
        ("--train-data-path", &*openorca),
        ("--output-path", &questions),
        ("--tokenizer", &args.tokenizer),
        ("--max-samples-per-dataset", Path::new(&all)),
    ];
    measure(args, "subsample-openorca", &subsample, rows as f64, "rows/s")?;
    let aggregate = [("--data-files", &*sharegpt), ("--output-file", &openings)];
    let megabytes = fs::metadata(&sharegpt)?.len() as f64 / 1e6;
    measure(args, "aggregate-sharegpt", &aggregate, megabytes, "MB/s")?;
    let merge = [
        ("--openorca-prompt-path", &*questions),
        ("--sharegpt-prompt-path", &openings),
        ("--output-file", &output("prompts.json")),
        ("--tokenizer", &args.tokenizer),
    ];
    let mut text = 0;
    for prompt in read_prompts(&questions)?.chain(read_prompts(&openings)?) {
        text += prompt?.instruction.len();
    }
    measure(args, "clean-and-merge", &merge, text as f64 / 1e6, "MB/s of text")
}

/// Runs a command several times and prints its row: the best rate, all rates, the highest peak.
fn measure(
    args: &Step1Args,
    command: &str,
    flags: &[(&str, &Path)],
    amount: f64,
    unit: &str,
) -> Result<()> {
    let (mut rates, mut peak) = (Vec::new(), 0);
    for _ in 0..args.runs {
        let (seconds, memory) = run_once(args, command, flags)?;
        rates.push(amount / seconds);
        peak = peak.max(memory);
    }
    let best = rates.iter().copied().fold(0.0, f64::max);
    let all: Vec<String> = rates.iter().map(|rate| format!("{rate:.1}")).collect();
    println!("| {command} | {best:.1} {unit} | {} | {peak} MB |", all.join(", "));
    Ok(())
}

/// The seconds that a command takes, and its peak memory in MB.
fn run_once(args: &Step1Args, command: &str, flags: &[(&str, &Path)]) -> Result<(f64, u64)> {
    let program = std::env::current_exe()?.with_file_name("step1-prompt-cleaning");
    let mut child = Command::new(program);
    child.arg(command).arg("--quiet").args(["--threads", &args.threads.to_string()]);
    for (flag, value) in flags {
        child.arg(flag).arg(value);
    }
    let start = Instant::now();
    let mut child = child.stderr(Stdio::inherit()).spawn()?;
    let peak = peak_mb(&mut child)?;
    let seconds = start.elapsed().as_secs_f64();
    ensure!(child.wait()?.success(), "{command} failed");
    Ok((seconds, peak))
}

/// Waits for the process; its highest memory in MB, as the system says while it runs.
fn peak_mb(child: &mut Child) -> Result<u64> {
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait()?.is_none() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        peak = peak.max(kilobytes.unwrap_or(0) / 1000);
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(peak)
}

/// Sentences of the sample data, of which the files are made.
struct Texts(Vec<String>);

impl Texts {
    fn read() -> Result<Texts> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dummy_data");
        let mut text = String::new();
        for name in ["dolly.jsonl", "oasst1.jsonl", "sharegpt.json"] {
            let file = folder.join(name);
            text += &fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        }
        let sentences = text
            .split(|c: char| "\"{}\\".contains(c))
            .flat_map(|part| part.split_inclusive(['.', '?', '!']))
            .map(|part| part.trim().to_owned())
            .filter(|part| (20..400).contains(&part.len()));
        Ok(Texts(sentences.collect()))
    }

    /// From `least` to `most` sentences, and a number that makes the text another one.
    fn text(&self, rng: &mut StdRng, least: usize, most: usize) -> String {
        let count = rng.random_range(least..=most);
        let parts: Vec<&str> =
            (0..count).map(|_| &*self.0[rng.random_range(0..self.0.len())]).collect();
        format!("{} [{}]", parts.join(" "), rng.random_range(0..1_000_000_000))
    }

    fn openorca(&self, folder: &Path, rows: usize) -> Result<PathBuf> {
        let mut rng = StdRng::seed_from_u64(0);
        let mut last = String::new();
        write_whole(folder.join(format!("openorca-{rows}.jsonl")), |file| {
            for row in 0..rows {
                if row == 0 || rng.random_range(0..REPEATS) > 0 {
                    last = self.text(&mut rng, 1, 6);
                }
                let place = rng.random_range(0..100);
                let name = COLLECTIONS[COLLECTION_ENDS.partition_point(|&end| end <= place)];
                let answer = self.text(&mut rng, 1, 3);
                writeln!(
                    file,
                    r#"{{"id": "{name}.{row}", "question": "{last}", "response": "{answer}"}}"#
                )?;
            }
            Ok(())
        })
    }

    fn sharegpt(&self, folder: &Path, megabytes: usize) -> Result<PathBuf> {
        let mut rng = StdRng::seed_from_u64(0);
        write_whole(folder.join(format!("sharegpt-{megabytes}.json")), |file| {
            let (mut bytes, mut row) = (0, 0);
            while bytes < megabytes * 1_000_000 {
                let turns: Vec<String> = (0..rng.random_range(1..=6))
                    .map(|_| {
                        let (ask, answer) = (self.text(&mut rng, 1, 6), self.text(&mut rng, 3, 30));
                        format!(
                            "{{\n      \"from\": \"human\",\n      \"value\": \"{ask}\"\n    }}, \
                             {{\n      \"from\": \"gpt\",\n      \"value\": \"{answer}\"\n    }}"
                        )
                    })
                    .collect();
                let start = if row == 0 { "[" } else { "," };
                let text = format!(
                    "{start}\n  {{\n    \"id\": \"{row}\",\n    \"conversations\": [{}]\n  }}",
                    turns.join(", ")
                );
                file.write_all(text.as_bytes())?;
                (bytes, row) = (bytes + text.len(), row + 1);
            }
            Ok(writeln!(file, "\n]")?)
        })
    }
}

/// Writes a file unless an earlier run has.
fn write_whole(
    path: PathBuf,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<PathBuf> {
    if !path.exists() {
        let unfinished = path.with_extension("unfinished");
        let mut file = BufWriter::new(File::create(&unfinished)?);
        write(&mut file)?;
        file.flush()?;
        fs::rename(unfinished, &path)?;
    }
    Ok(path)
}
