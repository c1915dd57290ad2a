//! What `slurm/README.md` says, compared with the programs and the scripts.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::pages::program;

/// What the page calls the command whose numbers it has, up to `--tp`.
const PLAN: &str = "`llama plan ";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn page() -> String {
    fs::read_to_string(root().join("slurm/README.md")).unwrap()
}

/// The cells of a row of a table.
fn cells(row: &str) -> Vec<&str> {
    row.trim_matches('|').split('|').map(str::trim).collect()
}

fn gigabytes(bytes: f64) -> String {
    format!("{:.1}", bytes / 1e9)
}

#[test]
fn memory_of_a_rank_is_what_the_plan_says() {
    let page = page();
    let (_, from) = page.split_once(PLAN).expect("the command");
    let (arguments, after) = from.split_once('`').unwrap();
    // Behind the head and the line under it.
    let table = after.lines().skip_while(|line| !line.starts_with('|')).skip(2);
    let rows: Vec<_> = table.take_while(|line| line.starts_with('|')).map(cells).collect();
    assert_eq!(rows.iter().map(|row| row[0]).collect::<Vec<_>>(), ["4", "8", "12"]);
    for row in rows {
        let output = program("llama")
            .arg("plan")
            .args(arguments.split(' '))
            .args(["--tp", row[0], "--json"])
            .current_dir(root())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
        let ranks = plan["ranks"].as_array().unwrap();
        let of = |name: &'static str| ranks.iter().map(move |rank| rank[name].as_f64().unwrap());
        let [least, most] =
            [of("weight_bytes").fold(f64::MAX, f64::min), of("weight_bytes").fold(0.0, f64::max)];
        let [least, most] = [least, most].map(gigabytes);
        let weights =
            if least == most { format!("{most} GB") } else { format!("{least} to {most} GB") };
        let peak = format!("{} GB", gigabytes(of("peak_bytes").fold(0.0, f64::max)));
        assert_eq!(row[1..], [weights, peak], "--tp {}", row[0]);
    }
}

/// What the page says of a variable that scripts set where it is not given.
#[test]
fn defaults_are_those_of_the_scripts() {
    let page = page();
    for (name, scripts) in [
        ("STEP2_CONFIG", &["step2", "step3"][..]),
        ("STEP3_CONFIG", &["step3"]),
        ("IDENTITY", &["step3"]),
        ("LAUNCH", &["step2", "step3"]),
        ("LAUNCH_ONE", &["step3"]),
        ("MAX_RESTARTS", &["step2", "step3"]),
    ] {
        let begin = format!("| `{name}` |");
        let row = page.lines().find(|line| line.starts_with(&begin)).expect(name);
        let said = cells(row)[2].trim_matches('`').to_owned();
        for script in scripts {
            let text = fs::read_to_string(root().join(format!("slurm/{script}.sbatch"))).unwrap();
            let line = format!("\n{name}=${{{name}:-{said}}}\n");
            assert!(text.contains(&line), "{script}.sbatch has no `{}`", line.trim());
        }
    }
}
