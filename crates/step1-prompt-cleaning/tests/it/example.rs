#[path = "../../examples/own_rules.rs"]
#[allow(dead_code, unreachable_pub, reason = "it is a program, whose main is for users")]
mod own_rules;

use serde_json::json;

use crate::support::{Folder, instruction_set};

#[test]
fn the_example_runs() {
    let folder = Folder::new();
    let texts = ["What is a fjord", " Name a fjord. ", "name a fjord.", "Name a fjord..", ""];
    let rows = texts.map(|text| json!({"instruction": text, "category": "open_qa"}));
    let input = folder.lines("d.jsonl", &rows);
    let output = folder.path("p.json");
    assert_eq!(own_rules::prepare(&input, &output).unwrap(), 2);
    assert_eq!(instruction_set(&output), ["Name a fjord.", "What is a fjord?"]);
}
