use std::process::{Command, Output};

use serde_json::Value;

use crate::{
    job::{BINARY, Job, stderr, succeeded},
    support::stories260k,
};

fn plan(flags: &[&str]) -> Output {
    let mut command = Command::new(BINARY);
    command.arg("plan").arg("--checkpoint").arg(stories260k()).args(flags).output().unwrap()
}

fn report(flags: &[&str]) -> Value {
    let output = plan(&[flags, &["--json"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Models of two ranks on nodes of four: 2 GB/s and 5 us in a node, 1 GB/s and 20 us between nodes.
const FLAGS: [&str; 30] = [
    "--tp",
    "2",
    "--ranks-per-node",
    "4",
    "--lora-r",
    "4",
    "--per-device-train-batch-size",
    "2",
    "--row-tokens",
    "40",
    "--learned",
    "0.5",
    "--gradient-accumulation-steps",
    "3",
    "--rows",
    "100",
    "--tokens-per-second",
    "1000",
    "--bandwidth-in-node",
    "2",
    "--latency-in-node",
    "5",
    "--bandwidth-between-nodes",
    "1",
    "--latency-between-nodes",
    "20",
    "--shard-optimizer",
    "true",
    "--nodes",
    "2",
];

#[track_caller]
fn close(row: &Value, key: &str, want: f64) {
    let got = row[key].as_f64().unwrap();
    assert!((got / want - 1.0).abs() < 1e-9, "{key}: {got}, not {want}");
}

#[test]
fn figures_on_paper_are_those_by_hand() {
    let report = report(&FLAGS);
    let scaling = &report["scaling"];

    // The second rank has 108 of 172 columns of the MLP, the first 64; heads and vocabulary halve. Rows of 40
    // tokens: a token sees 20 others on average.
    let layer = |heads: f64, kv_heads: f64, ffn: f64| {
        64.0 * (2.0 * 8.0 * heads + 2.0 * 8.0 * kv_heads + 3.0 * ffn) + 20.0 * 2.0 * 8.0 * heads
    };
    let all = 5.0 * layer(8.0, 4.0, 172.0) + 512.0 * 64.0;
    let busiest = 5.0 * layer(4.0, 2.0, 108.0) + 256.0 * 64.0;
    let share = busiest / all;
    close(scaling, "largest_share", share);

    // A micro-batch has 80 tokens, 40 of them learned. Its hidden states are summed twice a layer in forward,
    // and twice in backward; the head sums a maximum, two numbers, and a gradient of 64 for each learned token.
    let sums = |batches: f64| {
        let calls = (20.0 + 3.0) * batches + 2.0;
        let hidden = 20.0 * 80.0 * 64.0 * 4.0;
        let head = (1.0 + 2.0 + 64.0) * 40.0 * 4.0;
        // A of q, k, v, gate and up, B of o and down, each 4 x 64, and the norm of all gradients.
        let partial = 5.0 * 7.0 * 4.0 * 64.0 * 4.0 + 8.0;
        (calls, batches * (hidden + head) + partial)
    };
    // Of two ranks each sends and receives half of the data twice, in 2 hops.
    let within_replica = |batches: f64| {
        let (calls, bytes) = sums(batches);
        bytes / 2e9 + calls * 2.0 * 5e-6
    };
    // A and B of the second rank's parts.
    let numbers =
        5.0 * 4.0 * (5.0 * 64.0 + 2.0 * 64.0 + 32.0 + 2.0 * 16.0 + 2.0 * 108.0 + 32.0 + 108.0);
    // Gradients and loss are summed, each share's updates told, and two flags are asked of all ranks.
    let one_node = (4.0 * numbers + 8.0) / 2e9
        + 2.0 * 2.0 * 5e-6
        + 4.0 * numbers / 2e9
        + 2.0 * 1.0 * 5e-6
        + 1.5 * 16.0 / 2e9
        + 2.0 * 6.0 * 5e-6;
    // Four replicas on two nodes: the two groups of a node share its link.
    let two_nodes = 1.5 * (4.0 * numbers + 8.0) / 0.5e9
        + 2.0 * 6.0 * 20e-6
        + 4.0 * numbers / 0.5e9
        + 4.0 * 3.0 * 20e-6
        + 1.75 * 16.0 / 1e9
        + 2.0 * 14.0 * 20e-6;
    // Of the six micro-batches of a step the replicas of one node have three each, those of two at most two.
    for (table, number, [batches, rows, steps], between) in [
        ("same_rows", 0, [3.0, 12.0, 9.0], one_node),
        ("same_rows", 1, [2.0, 12.0, 9.0], two_nodes),
        ("more_rows", 0, [3.0, 12.0, 9.0], one_node),
        ("more_rows", 1, [3.0, 24.0, 5.0], two_nodes),
    ] {
        let row = &scaling[table][number];
        let ranks = 4.0 * (number + 1) as f64;
        close(row, "dp", ranks / 2.0);
        close(row, "rows_per_step", rows);
        close(row, "micro_batches", batches);
        let compute = batches * 80.0 * share / 1000.0;
        close(row, "compute_seconds", compute);
        close(row, "tp_seconds", within_replica(batches));
        close(row, "dp_seconds", between);
        let step = compute + within_replica(batches) + between;
        close(row, "step_seconds", step);
        close(row, "tokens_per_second", rows * 40.0 / step);
        close(row, "efficiency", rows * 40.0 / step / (1000.0 * ranks));
        close(row, "steps", steps);
        close(row, "hours", steps * step / 3600.0);
    }
    assert_eq!(scaling["same_rows"].as_array().unwrap().len(), 2);
}

/// Gradients of 70 B numbers travel in buckets; one rank alone exchanges nothing.
#[test]
fn large_gradients_are_counted_in_buckets() {
    let mut command = Command::new(BINARY);
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/llama/llama2-70b");
    command.args([
        "plan",
        "--checkpoint",
        config,
        "--bits",
        "4",
        "--dtype",
        "bf16",
        "--nodes",
        "1",
    ]);
    let output = command.args(["--tokens-per-second", "100", "--json"]).output().unwrap();
    let large: Value = serde_json::from_slice(&output.stdout).unwrap();
    let exchanges = large["scaling"]["same_rows"][0]["exchanges"].as_array().unwrap().clone();
    let gradients = exchanges.iter().find(|exchange| exchange["of"] == "gradients").unwrap();
    // 80 layers of r 64: 828,375,040 numbers, 197.5 times 4 Mi.
    assert_eq!(gradients["bytes"], Value::from(4 * 828_375_040_u64));
    assert_eq!(gradients["calls"], Value::from(198));
    assert!(exchanges.iter().all(|exchange| exchange["group"] != "tp"));
    let alone = report(&["--nodes", "1", "--ranks-per-node", "1", "--tokens-per-second", "100"]);
    assert_eq!(alone["scaling"]["same_rows"][0]["exchanges"], Value::Array(Vec::new()));
    close(&alone["scaling"]["same_rows"][0], "efficiency", 1.0);
}

/// The measurement is a run on one rank: its metrics without the first step.
#[test]
fn the_speed_of_one_rank_is_read_from_its_metrics() {
    let job = Job::new(12);
    succeeded(job.train("out", &["--max-steps", "4"]));
    let steps = &job.metrics("out")[1..];
    let sum = |key: &str| steps.iter().map(|step| step[key].as_f64().unwrap()).sum::<f64>();
    let path = job.path("out/metrics.jsonl");
    let path = path.to_str().unwrap();
    let report = report(&["--measured", path, "--nodes", "1"]);
    let rate = &report["scaling"]["rate"];
    close(rate, "tokens_per_second", sum("tokens") / sum("seconds"));
    assert_eq!(rate["source"], Value::from(format!("3 steps of {path}")));
    let tokens = report["tokens"].as_f64().unwrap();
    // Without --nodes there is one rank; with it there are the replicas of a node.
    close(&report, "hours", tokens / (8.0 * sum("tokens") / sum("seconds")) / 3600.0);
    let refused = plan(&["--measured", "/nonexistent/metrics.jsonl"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("/nonexistent/metrics.jsonl"), "{}", stderr(&refused));
}

#[test]
fn the_table_names_what_it_assumes() {
    let output = plan(&[&FLAGS[..], &["--nodes", "4"]].concat());
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let flags = [&FLAGS[..28], &["--nodes", "5"]].concat();
    let table = String::from_utf8(plan(&flags).stdout).unwrap();
    for text in [
        "steps of the same rows on more nodes",
        "steps whose rows grow with the nodes",
        "hidden states",
        "1000.0 tokens/s: --tokens-per-second",
        "the busiest has 57.76 %",
        "4 ranks a node, each 2 GB/s in one direction, 5.0 us a hop; a node 1 GB/s",
        "2 (n - 1) / n x bytes / bandwidth",
        "not counted",
    ] {
        assert!(table.contains(text), "{text}: {table}");
    }
    // Powers of two, and all of them.
    let nodes = |line: &str| line.split_whitespace().next().and_then(|word| word.parse().ok());
    let rows = table.lines().skip_while(|line| !line.contains("of the same rows")).skip(2);
    let counts: Vec<usize> = rows.map_while(nodes).collect();
    assert_eq!(counts, [1, 2, 4, 5]);
}

#[test]
fn nodes_that_models_do_not_fill_are_refused_with_both_numbers() {
    let nodes = ["--tokens-per-second", "1", "--nodes"];
    for (flags, code, words) in [
        (&["3", "--tp", "8", "--ranks-per-node", "4"][..], 1, ["3 of 4 ranks", "8 ranks each"]),
        (&["2", "--tp", "3", "--ranks-per-node", "4"], 1, ["2 of 4 ranks", "3 ranks each"]),
        (&["2", "--ranks-per-node", "0"], 2, ["--ranks-per-node 0", "at least 1"]),
        (&["2", "--latency-in-node=-1"], 2, ["--latency-in-node", "-1"]),
        (&["2", "--gflops", "1"], 2, ["--gflops", "--tokens-per-second"]),
    ] {
        let refused = plan(&[&nodes[..], flags].concat());
        let text = stderr(&refused);
        assert_eq!(refused.status.code(), Some(code), "{flags:?}: {text}");
        assert!(words.iter().all(|word| text.contains(word)), "{flags:?}: {text}");
    }
    let refused = plan(&["--ranks-per-node", "4"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("--nodes"), "{}", stderr(&refused));
}
