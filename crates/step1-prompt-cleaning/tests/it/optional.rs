use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use dromedary_prompt_cleaning::sources::Offer;
use dromedary_prompt_cleaning::{
    DecontaminationRule, Draft, DropReason, Dropped, Effect, Error, JudgeArgs, LanguageRule, Lists,
    MergeArgs, MergeConfig, NearDuplicates, OptionalArgs, Report, Rule, SharedArgs, Sketcher,
    Source, clean_and_merge, similarity, sources,
};
use serde_json::json;

use crate::support::{
    Folder, array, assert_sums, dummy_data, instruction_set, quiet, real_sample, small_tokenizer,
};

/// Numbers without a pattern (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % n as u64) as usize
    }

    fn word(&mut self) -> String {
        const SYLLABLES: [&str; 16] = [
            "ba", "con", "der", "el", "fi", "gra", "hu", "in", "lo", "mar", "ne", "po", "ri", "su",
            "ta", "ver",
        ];
        let syllables = 1 + self.below(3);
        (0..syllables).map(|_| SYLLABLES[self.below(SYLLABLES.len())]).collect()
    }

    fn words(&mut self, min: usize, max: usize) -> Vec<String> {
        let words = min + self.below(max - min);
        (0..words).map(|_| self.word()).collect()
    }
}

/// Originals, and of each a copy in which up to a third of the words is changed.
fn planted(pairs: usize) -> Vec<(String, String)> {
    let mut numbers = Numbers(7);
    let mut pair = || {
        let words = numbers.words(10, 120);
        let mut copy = words.clone();
        for _ in 0..=numbers.below(words.len() / 3) {
            let place = numbers.below(copy.len());
            match numbers.below(3) {
                0 => copy[place] = numbers.word(),
                1 => copy.insert(place, numbers.word()),
                _ => drop(copy.remove(place)),
            }
        }
        (words.join(" "), copy.join(" "))
    };
    (0..pairs).map(|_| pair()).collect()
}

#[test]
fn planted_near_duplicates_are_found_and_nothing_else() {
    const THRESHOLD: f64 = 0.8;
    let pairs = planted(4000);
    let sketcher = Sketcher::new(THRESHOLD);
    let folder = Folder::new();
    let mut texts = NearDuplicates::new(THRESHOLD, &folder.path("")).unwrap();
    for (original, _) in &pairs {
        assert_eq!(texts.admit(sketcher.sketch(original)).unwrap(), None);
    }
    // By tenths of similarity: copies, and those found.
    let mut found_by_class: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    let (mut right, mut wrong) = (0, 0);
    for (index, (original, copy)) in pairs.iter().enumerate() {
        let truth = similarity(original, copy);
        let class = found_by_class.entry((truth * 20.0) as u64 * 5).or_default();
        class.0 += 1;
        // A copy that is not found is added, which does no harm: copies differ from each other.
        if let Some(found) = texts.admit(sketcher.sketch(copy)).unwrap() {
            class.1 += 1;
            let is_right = found.index == index && truth >= THRESHOLD;
            right += u64::from(is_right);
            wrong += u64::from(!is_right);
        }
    }
    println!("percent of similarity: (copies, found) {found_by_class:?}");
    let similar: u64 = found_by_class.range(80..).map(|(_, (copies, _))| copies).sum();
    let dissimilar: u64 = found_by_class.range(..80).map(|(_, (copies, _))| copies).sum();
    assert!(similar > 800 && dissimilar > 800, "{found_by_class:?}");
    println!("recall {:.4}, precision {}", right as f64 / similar as f64, wrong == 0);
    assert_eq!(wrong, 0);
    assert!(right as f64 >= 0.99 * similar as f64, "{right} of {similar}");
}

#[test]
fn other_thresholds_are_kept_to() {
    let pairs = planted(400);
    for threshold in [0.5, 0.7, 0.9, 1.0] {
        let sketcher = Sketcher::new(threshold);
        let folder = Folder::new();
        let mut texts = NearDuplicates::new(threshold, &folder.path("")).unwrap();
        let (mut similar, mut found) = (0, 0);
        for (original, copy) in &pairs {
            texts.admit(sketcher.sketch(original)).unwrap();
            similar += usize::from(similarity(original, copy) >= threshold);
            found += usize::from(texts.admit(sketcher.sketch(copy)).unwrap().is_some());
        }
        assert!(found <= similar && found as f64 >= 0.97 * similar as f64, "{threshold}: {found}");
    }
}

#[test]
fn texts_are_compared_from_disk_too() {
    let folder = Folder::new();
    let sketcher = Sketcher::new(0.9);
    let mut texts = NearDuplicates::new(0.9, &folder.path("")).unwrap();
    // More than what waits in memory.
    let text = |n: u64| format!("{n} {}", Numbers(n).words(1000, 1001).join(" "));
    for n in 0..600 {
        assert_eq!(texts.admit(sketcher.sketch(&text(n))).unwrap(), None, "{n}");
    }
    for n in [0, 1, 300, 598, 599] {
        let found = texts.admit(sketcher.sketch(&format!("{} more", text(n)))).unwrap().unwrap();
        assert_eq!(found.index, n as usize);
        assert!(found.similarity > 0.9 && found.similarity < 1.0, "{found:?}");
    }
    assert_eq!(folder.names().len(), 0, "the file has no name");
}

fn dropped(rule: &impl Rule, text: &str) -> Option<Dropped> {
    match rule.apply(&mut Draft::new(Source::Dolly, text)) {
        Effect::Dropped(dropped) => Some(dropped),
        _ => None,
    }
}

#[test]
fn other_languages_go_and_what_is_uncertain_stays() {
    let lists = Lists::built_in();
    let rule = |codes: &[&str]| {
        let codes: Vec<String> = codes.iter().map(|&code| code.to_owned()).collect();
        LanguageRule::new(&codes, &lists)
    };
    let english = rule(&["en"]).unwrap();
    let german = "Warum ist der Himmel am Abend rot, und warum ist er mittags blau? Bitte \
        erkl\u{e4}re es mir mit einfachen Worten, die auch ein Kind versteht.";
    let found = dropped(&english, german).unwrap();
    assert_eq!((found.reason, found.detail.as_str()), (DropReason::OtherLanguage, "German"));
    assert!(
        dropped(&english, "\u{4f60}\u{80fd}\u{89e3}\u{91ca}\u{4e00}\u{4e0b}\u{5417}").is_some()
    );
    assert_eq!(dropped(&rule(&["en", "de"]).unwrap(), german), None);
    assert_eq!(dropped(&rule(&["deu"]).unwrap(), german), None);
    for text in ["Hi", "fn main() {}", "x = [i for i in y]", "Why is the sky red in the evening?"] {
        assert_eq!(dropped(&english, text), None, "{text}");
    }
    let unknown = rule(&["xx"]).unwrap_err();
    assert!(matches!(&unknown, Error::UnknownLanguage { code, .. } if code == "xx"), "{unknown}");
}

#[test]
fn english_prompts_are_not_taken_for_another_language() {
    let rule = LanguageRule::new(&["en".to_owned()], &Lists::built_in()).unwrap();
    let taken = |offers: sources::Offers| {
        let mut taken = Vec::new();
        for row in offers {
            let (Offer::Draft(Draft { instruction: text, .. }) | Offer::Unfit { text, .. }) =
                row.unwrap().content.unwrap();
            if let Some(dropped) = dropped(&rule, &text) {
                taken.push((dropped.detail, text.chars().take(80).collect::<String>()));
            }
        }
        println!("{taken:#?}");
        taken.len()
    };
    let Some(path) = real_sample("oasst1/en-validation-400.jsonl") else { return };
    // Three of the 400 are Spanish; one more, with two names of programs, is taken for Portuguese.
    assert_eq!(taken(sources::oasst(&path).unwrap()), 4);
    let Some(path) = real_sample("dolly/dolly_exact_45.jsonl") else { return };
    assert_eq!(taken(sources::dolly(&path, Lists::built_in()).unwrap()), 0);
    // 14 of its rows are in another language, 3 more ask in English for the translation of a text.
    let Some(path) = real_sample("openorca/openorca_shaped_284.jsonl") else { return };
    assert_eq!(taken(sources::openorca(&path).unwrap()), 17);
}

fn benchmark(content: &str, name: &str) -> (Folder, DecontaminationRule) {
    let folder = Folder::new();
    let path = folder.write(name, content);
    let rule = DecontaminationRule::open(&[path]).unwrap();
    (folder, rule)
}

#[test]
fn thirteen_words_of_a_benchmark_contaminate() {
    let question =
        "Why would a camel with two humps cross the hot desert rather than walk around it?";
    let content = json!({"examples": [{"input": question, "target_scores": {"No.": 1}}]});
    let (_folder, rule) = benchmark(&content.to_string(), "task.json");
    let found = dropped(&rule, &format!("Answer me. {}", question.to_uppercase())).unwrap();
    assert_eq!(found.reason, DropReason::Contaminated);
    assert!(found.detail.contains("task.json") && found.detail.contains("CAMEL"), "{found}");
    // 13 of its words, and 12.
    let words: Vec<&str> = question.split(' ').collect();
    assert!(dropped(&rule, &words[1..14].join(" - ")).is_some());
    assert_eq!(dropped(&rule, &words[1..13].join(" ")), None);
    assert_eq!(dropped(&rule, "No."), None);
}

#[test]
fn shorter_texts_of_a_benchmark_count_as_a_whole() {
    let text = "What should a tired camel driver drink first?\nWho rode it?\nYes\n";
    let (_folder, rule) = benchmark(text, "questions.txt");
    assert!(dropped(&rule, "So: what should a tired camel driver drink first?").is_some());
    assert_eq!(dropped(&rule, "What should a tired camel driver drink?"), None);
    assert!(dropped(&rule, "who rode it").is_some());
    assert_eq!(dropped(&rule, "Tell me who rode it"), None);
    assert_eq!(dropped(&rule, "Yes"), None);
}

#[test]
fn benchmarks_are_read_in_every_layout() {
    let question = "Which of the three camels in the yard is the oldest?";
    for (name, content) in [
        ("a.json", json!([{"question": question, "mc1_targets": {"That one": 1}}]).to_string()),
        ("a.json", json!({"target_scores": {question: 1}}).to_string()),
        ("a.jsonl", format!("{}\n", json!({"q": {"text": [question]}}))),
        ("a.txt", question.to_owned()),
    ] {
        let (_folder, rule) = benchmark(&content, name);
        assert!(dropped(&rule, question).is_some(), "{name}: {content}");
        assert_eq!(dropped(&rule, "Which of the three camels is it?"), None);
    }
    let folder = Folder::new();
    for (name, content, part) in
        [("none.txt", "One\nTwo\n", "none.txt: no text"), ("broken.json", "{", "broken.json")]
    {
        let error = DecontaminationRule::open(&[folder.write(name, content)]).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn the_benchmarks_of_the_paper_are_found() {
    let Some(folder) = real_sample("hhh") else { return };
    let parts = ["harmless", "helpful", "honest", "other"];
    let mut files: Vec<PathBuf> =
        parts.iter().map(|part| folder.join(part).join("task.json")).collect();
    files.extend(real_sample("truthfulqa/mc_task_v0.json"));
    let rule = DecontaminationRule::open(&files).unwrap();
    let text = fs::read_to_string(&files[4]).unwrap();
    let tasks: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    for task in &tasks {
        let question = task["question"].as_str().unwrap();
        // Fewer than three words stand in any text.
        if question.split(' ').count() >= 3 {
            assert!(
                dropped(&rule, &format!(" {} ", question.to_lowercase())).is_some(),
                "{question}"
            );
        }
    }
    let Some(path) = real_sample("openorca/openorca_shaped_284.jsonl") else { return };
    let found = sources::openorca(&path).unwrap().filter(|row| {
        let Ok(Offer::Draft(draft)) = &row.as_ref().unwrap().content else { panic!() };
        dropped(&rule, &draft.instruction).is_some()
    });
    assert!(found.count() <= 3, "ordinary prompts share little with them");
}

/// The sources of the sample data, with these optional rules.
fn merge(folder: &Folder, name: &str, optional: OptionalArgs, shared: SharedArgs) -> Report {
    let args = MergeArgs {
        dolly: vec![dummy_data("dolly.jsonl")],
        oasst: vec![dummy_data("oasst1.jsonl")],
        output_file: Some(folder.path(name)),
        judge: JudgeArgs { tokenizer: Some(small_tokenizer()), ..JudgeArgs::default() },
        optional,
        shared,
        ..MergeArgs::default()
    };
    let report = clean_and_merge(&MergeConfig::try_from(args).unwrap(), &quiet()).unwrap();
    assert_sums(&report);
    report
}

fn plain(optional: OptionalArgs) -> (Folder, Report) {
    let folder = Folder::new();
    let report = merge(&folder, "p.json", optional, SharedArgs::default());
    (folder, report)
}

#[test]
fn caps_and_mixes_are_kept_to() {
    let (_folder, all) = plain(OptionalArgs::default());
    let kept = |report: &Report, source: &str| report.sources[source].kept;
    let (dolly, oasst) = (kept(&all, "dolly"), kept(&all, "oasst1"));
    assert!(dolly > 20 && oasst > 20);
    let max = vec!["dolly=7".parse().unwrap()];
    let (_folder, capped) = plain(OptionalArgs { max_per_source: max, ..OptionalArgs::default() });
    assert_eq!((kept(&capped, "dolly"), kept(&capped, "oasst1")), (7, oasst));
    assert_eq!(capped.sources["dolly"].dropped["over_cap"], dolly - 7);
    let mix = vec!["dolly=4".parse().unwrap(), "oasst1=1".parse().unwrap()];
    let (_folder, mixed) = plain(OptionalArgs { mix, ..OptionalArgs::default() });
    assert_eq!((kept(&mixed, "dolly"), kept(&mixed, "oasst1")), (dolly, dolly / 4));
    assert_eq!(mixed.sources["oasst1"].dropped["over_mix"], oasst - dolly / 4);
}

#[test]
fn wrong_settings_are_named() {
    let resolve = |optional| {
        let args = MergeArgs {
            dolly: vec![dummy_data("dolly.jsonl")],
            oasst: vec![dummy_data("oasst1.jsonl")],
            output_file: Some("p.json".into()),
            optional,
            ..MergeArgs::default()
        };
        MergeConfig::try_from(args).unwrap_err().to_string()
    };
    let default = OptionalArgs::default;
    let per = |text: &str| text.parse().unwrap();
    let ratio = |text: &str| text.parse().unwrap();
    for (optional, part) in [
        (OptionalArgs { sample: Some(0.0), ..default() }, "--sample 0"),
        (OptionalArgs { near_duplicates: Some(1.5), ..default() }, "--near-duplicates 1.5"),
        (OptionalArgs { max_per_source: vec![per("openorca=1")], ..default() }, "no file here"),
        (OptionalArgs { max_per_source: vec![per("dolly=1"); 2], ..default() }, "twice"),
        (OptionalArgs { mix: vec![ratio("dolly=1")], ..default() }, "does not name oasst1"),
        (
            OptionalArgs { mix: vec![ratio("dolly=0"), ratio("oasst1=0")], ..default() },
            "all ratios",
        ),
        (OptionalArgs { mix: vec![ratio("dolly=-1"), ratio("oasst1=1")], ..default() }, "-1"),
        (OptionalArgs { languages: vec!["xx".into()], ..default() }, "\"xx\""),
    ] {
        let message = resolve(optional);
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[test]
fn a_keyed_sample_stays_when_rows_are_added_elsewhere() {
    let folder = Folder::new();
    let row = |n: u64| {
        let text = Numbers(n).words(6, 9).join(" ");
        json!({"instruction": text, "category": "open_qa", "context": "", "response": "r"})
    };
    let sample = |name: &str, rows: &[serde_json::Value], share: f64, with_oasst: bool| {
        let args = MergeArgs {
            dolly: vec![folder.lines(&format!("{name}.jsonl"), rows)],
            oasst: with_oasst.then(|| dummy_data("oasst1.jsonl")).into_iter().collect(),
            output_file: Some(folder.path(name)),
            optional: OptionalArgs { sample: Some(share), ..OptionalArgs::default() },
            ..MergeArgs::default()
        };
        let report = clean_and_merge(&MergeConfig::try_from(args).unwrap(), &quiet()).unwrap();
        assert_sums(&report);
        let rows = array(&folder.path(name)).into_iter().filter(|row| row["source"] == "dolly");
        let texts = rows.map(|row| row["instruction"].as_str().unwrap().to_owned());
        texts.collect::<std::collections::BTreeSet<String>>()
    };
    let rows: Vec<serde_json::Value> = (0..2000).map(row).collect();
    let some = sample("some.json", &rows[500..1500], 0.3, false);
    assert!((250..350).contains(&some.len()), "{}", some.len());
    let more = sample("more.json", &rows, 0.3, true);
    assert!(more.is_superset(&some) && more.len() > some.len() + 200, "{}", more.len());
    assert!(sample("wide.json", &rows, 0.5, false).is_superset(&more));
}

#[test]
fn threads_and_runs_give_identical_bytes_with_every_rule_on() {
    let folder = Folder::new();
    let benchmark = folder.write("b.txt", "What is the largest ocean on Earth?\n");
    let run = |threads| {
        let optional = OptionalArgs {
            near_duplicates: Some(0.6),
            languages: vec!["en".to_owned()],
            decontaminate: vec![benchmark.clone()],
            sample: Some(0.9),
            max_per_source: vec!["oasst1=20".parse().unwrap()],
            mix: vec!["dolly=1".parse().unwrap(), "oasst1=1".parse().unwrap()],
        };
        let shared = SharedArgs {
            threads: Some(threads),
            report: Some(folder.path("report")),
            ..SharedArgs::default()
        };
        let report = merge(&folder, "p.json", optional, shared);
        assert!(report.sources["dolly"].dropped["contaminated"] > 0, "{threads}");
        let settings = format!("\"threads\": {threads},");
        let read = |name: &str| fs::read_to_string(folder.path(name)).unwrap();
        let counts = read("report/report.json");
        assert!(counts.contains(&settings), "{counts}");
        (read("p.json"), counts.replace(&settings, ""))
    };
    let one = run(1);
    for again in [run(2), run(2)] {
        assert!(again.0 == one.0, "the prompts differ");
        assert!(again.1 == one.1, "the reports differ");
    }
}

#[test]
fn near_duplicates_and_languages_are_off_by_default() {
    let folder = Folder::new();
    let texts = [
        "Please write a short poem about the old camel in the red desert.",
        "Please write a short poem about the old camels in the red desert.",
        "Bitte schreibe ein kurzes Gedicht \u{fc}ber das alte Kamel in der roten W\u{fc}ste.",
    ];
    let rows = texts.map(|text| json!({"instruction": text, "category": "open_qa"}));
    let dolly = folder.lines("d.jsonl", &rows);
    let run = |optional: OptionalArgs| {
        let args = MergeArgs {
            dolly: vec![dolly.clone()],
            output_file: Some(folder.path("p.json")),
            optional,
            ..MergeArgs::default()
        };
        clean_and_merge(&MergeConfig::try_from(args).unwrap(), &quiet()).unwrap();
        instruction_set(&folder.path("p.json"))
    };
    let sorted = |texts: &[&str]| {
        let mut texts: Vec<String> = texts.iter().map(|&text| text.to_owned()).collect();
        texts.sort();
        texts
    };
    assert_eq!(run(OptionalArgs::default()), sorted(&texts));
    let near = OptionalArgs { near_duplicates: Some(0.8), ..OptionalArgs::default() };
    assert_eq!(run(near), sorted(&[texts[0], texts[2]]));
    let english = OptionalArgs { languages: vec!["en".into()], ..OptionalArgs::default() };
    assert_eq!(run(english), sorted(&texts[..2]));
}

#[test]
fn lists_of_a_file_replace_those_that_are_built_in() {
    let folder = Folder::new();
    let rows = [
        json!({"instruction": "Name a camel.\nLike and share"}),
        json!({"instruction": "Name a river.\nShare Prompt"}),
    ];
    let prompts = folder.lines("s.jsonl", &rows);
    let lists = folder.write("lists.toml", "buttons = [\"Like and share\"]\n");
    let args = MergeArgs {
        sharegpt_prompt_path: vec![prompts],
        output_file: Some(folder.path("p.json")),
        judge: JudgeArgs { lists: Some(lists.clone()), ..JudgeArgs::default() },
        ..MergeArgs::default()
    };
    clean_and_merge(&MergeConfig::try_from(args).unwrap(), &quiet()).unwrap();
    let texts = instruction_set(&folder.path("p.json"));
    assert_eq!(texts, ["Name a camel.", "Name a river.\nShare Prompt"]);
    let lists: Arc<Lists> = Lists::open(Some(&lists)).unwrap();
    assert_eq!(lists.languages, Lists::built_in().languages);
}
