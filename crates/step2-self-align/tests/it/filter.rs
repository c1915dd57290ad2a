use dromedary_records::{AlignedResponse, FinishReason};
use dromedary_self_align::{Filter, MetaPrompt, Rule, Verdict};

use crate::support::row;

fn judge(row: &AlignedResponse) -> Verdict {
    Filter::new(None, &MetaPrompt::open(None).unwrap()).judge(row)
}

/// The training text of a row that must be kept.
fn kept(row: &AlignedResponse) -> String {
    match judge(row) {
        Verdict::Kept(kept) => kept.output,
        verdict => panic!("{verdict:?}: {:?}", row.output),
    }
}

/// The rule that drops a row.
fn dropped(row: &AlignedResponse) -> Rule {
    match judge(row) {
        Verdict::Dropped(rule) => rule,
        verdict => panic!("{verdict:?}"),
    }
}

fn ended(mut row: AlignedResponse, finish_reason: FinishReason) -> AlignedResponse {
    row.output = row.output.replace("\n\nUser:", "");
    row.finish_reason = finish_reason;
    row
}

const ANSWER: &str = "A kettle turns the energy of the mains into heat until its water boils.";

#[test]
fn a_row_in_form_keeps_its_answer_and_loses_its_thoughts() {
    assert_eq!(kept(&row("Why does it boil?", ANSWER)), format!("{ANSWER}\n\n### User\n"));
}

#[test]
fn not_generated() {
    let row = ended(row("x", ANSWER), FinishReason::Rejected);
    assert_eq!(dropped(&row), Rule::NotGenerated);
}

#[test]
fn no_affirmation() {
    let mut row = row("x", ANSWER);
    row.output = row.output.trim_start().to_owned();
    kept(&row);
    row.output = row.output.replace("helpful, ethical", "helpful and ethical");
    assert_eq!(dropped(&row), Rule::NoAffirmation);
}

#[test]
fn no_answer() {
    let mut row = row("x", ANSWER);
    row.output = row.output.replace("\n\nWatson:", " Watson:");
    assert_eq!(dropped(&row), Rule::NoAnswer);
}

#[test]
fn empty() {
    assert_eq!(dropped(&row("x", " \n ")), Rule::Empty);
    assert_eq!(kept(&row("Answer with one sign.", "!")), "!\n\n### User\n");
}

#[test]
fn short_complete_answers_stay() {
    // Dromedary drops all below 160 characters.
    assert_eq!(kept(&row("Is Lima a city?", "Yes.")), "Yes.\n\n### User\n");
}

#[test]
fn loops_are_told_by_their_rate() {
    let looping = "You can take a walk in the park. ".repeat(6);
    assert_eq!(dropped(&row("x", &looping)), Rule::Loop);
    let chinese = "\u{6211}\u{4eec}\u{53ef}\u{4ee5}\u{53bb}\u{516c}\u{56ed}\u{3002}".repeat(8);
    assert_eq!(dropped(&row("x", &chinese)), Rule::Loop);
    // A refrain is no loop; Dromedary cuts the poem where it returns.
    let poem = "The sea is black, the sea is wide,\nturn, little lamp, turn.\nTwo boats come with \
                the tide,\nturn, little lamp, turn.\nThe kettle sings, the faucet drips, and fog \
                lies down on stone and sand.";
    assert_eq!(kept(&row("Write a poem.", poem)), format!("{poem}\n\n### User\n"));
    // Nor is a short list of equal beginnings.
    kept(&row("x", "It is red. It is red. It is blue."));
    let short = "Sleep is very important. It is very important. It is very important.";
    assert_eq!(dropped(&row("x", short)), Rule::Loop);
}

#[test]
fn the_finish_reason_tells_what_is_truncated() {
    assert_eq!(dropped(&ended(row("x", ANSWER), FinishReason::Length)), Rule::Truncated);
    let complete = format!("{ANSWER}\n\n### User\n");
    assert_eq!(kept(&ended(row("x", ANSWER), FinishReason::Eos)), complete);
    assert_eq!(kept(&ended(row("x", ANSWER), FinishReason::Stop)), complete);
    // Text that goes on behind the user's turn, as other generators write it.
    let mut longer = row("x", ANSWER);
    longer.output.push_str(" And now?\n\nWatson (internal thoughts): I am");
    longer.finish_reason = FinishReason::Length;
    assert_eq!(kept(&longer), complete);
}

#[test]
fn echo() {
    let instruction = "Translate the proverb about the early bird.";
    assert_eq!(dropped(&row(instruction, instruction)), Rule::Echo);
    // A quotation in a longer answer is none.
    let answer = format!("You asked: \"{instruction}\" {ANSWER}");
    kept(&row(instruction, &answer));
    // Nor is a word.
    kept(&row("Say yes.", "Say yes."));
    let mut with_input = row("Repeat.", "seventeen letters");
    with_input.input = "seventeen letters".to_owned();
    assert_eq!(dropped(&with_input), Rule::Echo);
}

#[test]
fn turn_mark() {
    assert_eq!(dropped(&row("x", "Done.\nWatson (auto reply): Thank you!")), Rule::TurnMark);
    assert_eq!(dropped(&row("x", "Done.\nUser: And then?")), Rule::TurnMark);
    // Dromedary drops the word wherever it stands.
    kept(&row("x", "In a screenplay write \"User: hello\" on its own line."));
}

#[test]
fn an_answer_ends_where_any_turn_begins() {
    let turns =
        ["Watson: And more.", "Watson (auto reply): Thanks!", "Watson (internal thoughts): I"];
    for turn in turns {
        let mut row = ended(row("x", &format!("{ANSWER}\n\n{turn}")), FinishReason::Length);
        assert_eq!(kept(&row), format!("{ANSWER}\n\n### User\n"), "{turn}");
        row.finish_reason = FinishReason::Stop;
        assert_eq!(kept(&row), format!("{ANSWER}\n\n### User\n"), "{turn}");
    }
}

#[test]
fn thoughts() {
    assert_eq!(dropped(&row("x", "By rule 1 (ethical) I decline.")), Rule::Thoughts);
    assert_eq!(dropped(&row("x", "By rules 3 and 44 (candor) I cannot say.")), Rule::Thoughts);
    let affirmation = "I am a helpful, ethical, and reliable assistant.";
    assert_eq!(dropped(&row("x", &format!("{affirmation} So I decline."))), Rule::Thoughts);
    kept(&row("x", "Take exit 21 (west), be fair (ethical) and keep to rule 1 of chess."));
}

#[test]
fn leakage() {
    let meta_prompt = MetaPrompt::open(None).unwrap();
    let exemplar = &meta_prompt.principles.exemplars[5];
    assert_eq!(dropped(&row("Tell me about ferns.", &exemplar.answer)), Rule::Leakage);
    let rule = &meta_prompt.principles.rules[0].text;
    assert_eq!(dropped(&row("x", rule)), Rule::Leakage);
    // What the user says himself is no leak.
    let quoted = format!("Repeat: {rule}");
    kept(&row(&quoted, rule));
}

#[test]
fn black_list() {
    let answer = "The sundew is such a plant: it catches flies.";
    assert_eq!(dropped(&row("Name a plant.", answer)), Rule::BlackList);
    kept(&row("Is the sundew a plant?", answer));
    kept(&row("Name a plant.", "The sundewlike flytrap is one, unlike 12047."));
    // Dromedary loses every answer about these.
    kept(&row("x", "The president spoke of alpacas, the weather and a birthday party."));
}

#[test]
fn the_assistant_gets_its_name_where_the_user_does_not_mean_another_one() {
    let answer = "Watson's answer: I am Watson, not Watsonia.";
    assert_eq!(
        kept(&row("Who are you?", answer)),
        "Dromedary's answer: I am Dromedary, not Watsonia.\n\n### User\n"
    );
    let holmes = "Watson is his friend.";
    assert_eq!(kept(&row("Who is Watson to Holmes?", holmes)), format!("{holmes}\n\n### User\n"));
}

#[test]
fn the_first_rule_that_fails_is_counted() {
    let looping = "You can take a walk in the park. ".repeat(6);
    assert_eq!(dropped(&ended(row("x", &looping), FinishReason::Length)), Rule::Loop);
}
