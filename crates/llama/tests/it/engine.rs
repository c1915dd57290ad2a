//! The generation engine on stories260k: batches, prefix, stopping, sampling, bad requests.

use std::ops::ControlFlow;

use dromedary_llama::{
    Error,
    generation::{Engine, EngineConfig, Event, FinishReason, PrefixUse, Request, Sampling},
};
use dromedary_parallel::SingleProcess;

use crate::support::{Loaded, Output, data, greedy_ids, request, run, stories};

const TEXTS: [&str; 7] = [
    "Once upon a time",
    "Lily and Tom went to the park. They saw a big",
    "The dog",
    "One day, a little girl named Lily found a needle in her room. She knew it was difficult to play",
    "Mom said",
    "There was a cat who",
    "A boy had a red ball. He",
];

fn loaded() -> Loaded {
    Loaded::new(&stories(), &SingleProcess)
}

fn prompts(loaded: &Loaded) -> Vec<Request> {
    let text = |(index, text): (usize, &&str)| {
        request(format!("row {index}"), loaded.tokenizer.encode_with_bos(text))
    };
    TEXTS.iter().enumerate().map(text).collect()
}

fn config() -> EngineConfig {
    EngineConfig { max_batch_size: 3, max_seq_len: 200, max_gen_len: 40, ..EngineConfig::default() }
}

fn engine(loaded: &Loaded, config: EngineConfig) -> Engine<'_> {
    loaded.engine(&SingleProcess, config)
}

fn tokens_by_row(mut output: Output) -> Vec<(String, Vec<u32>)> {
    output.finished.sort_by(|a, b| a.id.cmp(&b.id));
    output.finished.into_iter().map(|row| (row.id, row.tokens)).collect()
}

#[test]
fn slots_are_refilled_and_rows_equal_the_model_run_alone() {
    let loaded = loaded();
    let requests = prompts(&loaded);
    let output = run(&mut engine(&loaded, config()), requests.clone());
    assert_eq!(output.finished.len(), TEXTS.len());
    for request in requests {
        let row = output.row(&request.id);
        assert_eq!(row.tokens, greedy_ids(&loaded.model, &request.tokens, 40, &SingleProcess));
        assert_eq!(row.text, loaded.tokenizer.decode_continuation(&row.tokens));
        assert_eq!(row.text, output.streamed[&row.id]);
        assert_eq!(
            (row.finish_reason, row.prompt_tokens),
            (FinishReason::Length, request.tokens.len())
        );
    }
    let statistics = output.statistics;
    assert_eq!((statistics.finished, statistics.output_tokens), (7, 7 * 40));
    assert_eq!(statistics.decode_tokens, 7 * 39);
}

#[test]
fn a_row_is_the_same_alone_and_in_any_batch() {
    let loaded = loaded();
    let samplings =
        [Sampling::default(), Sampling::nucleus(1.0, 0.95), Sampling::nucleus(1.0, 1.0)];
    for sampling in samplings {
        let rows = |max_batch_size, requests| {
            let config = EngineConfig { max_batch_size, sampling: sampling.clone(), ..config() };
            tokens_by_row(run(&mut engine(&loaded, config), requests))
        };
        let requests = prompts(&loaded);
        let together = rows(7, requests.clone());
        assert_eq!(rows(3, requests.clone()), together);
        let reversed = requests.iter().rev().cloned().collect();
        assert_eq!(rows(2, reversed), together);
        for (request, row) in requests.iter().zip(&together) {
            assert_eq!(rows(1, vec![request.clone()]), std::slice::from_ref(row));
        }
    }
}

#[test]
fn sampled_rows_depend_on_seed_and_id() {
    let loaded = loaded();
    let sampling = Sampling::nucleus(1.0, 1.0);
    let tokens = loaded.tokenizer.encode_with_bos("Once upon a time");
    let one = |id: &str, seed| {
        let row = Request { id: id.into(), tokens: tokens.clone(), seed };
        run(
            &mut engine(&loaded, EngineConfig { sampling: sampling.clone(), ..config() }),
            vec![row],
        )
        .finished
        .remove(0)
        .tokens
    };
    let base = one("a", 1);
    assert_eq!(base, one("a", 1));
    assert_ne!(base, one("a", 2));
    assert_ne!(base, one("b", 1));
}

/// Flat distributions: the candidates do not tell each token.
#[test]
fn the_statistics_are_those_of_one_run() {
    let loaded = loaded();
    let config = EngineConfig { sampling: Sampling::nucleus(1e5, 1.0), ..config() };
    let mut engine = engine(&loaded, config);
    let [first, second] = [(); 2].map(|()| run(&mut engine, prompts(&loaded)).statistics);
    assert!(first.gathered_rows > 0);
    assert_eq!(
        (first.gathered_rows, first.output_tokens, first.finished),
        (second.gathered_rows, second.output_tokens, second.finished)
    );
}

#[test]
fn a_pinned_prefix_changes_nothing_but_the_work() {
    let loaded = loaded();
    let prefix = loaded.tokenizer.encode_with_bos(
        "Lily and Tom like to play. They have a big box of toys and a red ball. One day, they go to the park",
    );
    let mut requests = Vec::new();
    for (index, used) in [prefix.len(), prefix.len(), 9, 1, 0].into_iter().enumerate() {
        // Another token follows what is shared, so that no more is shared by chance.
        let mut tokens = prefix[..used].to_vec();
        tokens.push(prefix.get(used).map_or(426, |token| token ^ 1));
        tokens.extend(loaded.tokenizer.encode(TEXTS[index]));
        requests.push(request(format!("row {index}"), tokens));
    }
    // The prefix itself, and a beginning of it: at least the last token is computed.
    requests.push(request("row 5", prefix.clone()));
    requests.push(request("row 6", prefix[..4].to_vec()));
    let all: usize = requests.iter().map(|request| request.tokens.len()).sum();
    let saved = 2 * prefix.len() + 9 + 1 + (prefix.len() - 1) + 3;

    let plain = run(&mut engine(&loaded, config()), requests.clone());
    assert_eq!(plain.statistics.prompt_tokens, all as u64);
    let mut with_prefix = engine(&loaded, config());
    with_prefix.pin_prefix(&prefix).unwrap();
    assert_eq!(with_prefix.prefix().unwrap().len(), prefix.len());
    let pinned = run(&mut with_prefix, requests.clone());
    assert_eq!(pinned.statistics.prompt_tokens, (all - saved) as u64);
    let again = run(&mut with_prefix, requests);
    let plain = tokens_by_row(plain);
    assert_eq!(tokens_by_row(pinned), plain);
    assert_eq!(tokens_by_row(again), plain);
}

#[test]
fn a_copied_prefix_gives_the_rows_of_a_shared_one() {
    let loaded = loaded();
    let prefix =
        loaded.tokenizer.encode_with_bos("Once upon a time, there was a little girl named");
    let texts = [" Lily", " Sue. She had a dog", " Ann who", ", there was a cat"];
    let requests: Vec<Request> = texts
        .iter()
        .map(|text| request(*text, [&prefix[..], &loaded.tokenizer.encode(text)].concat()))
        .chain([request("other", loaded.tokenizer.encode_with_bos("Once upon a hill"))])
        .collect();
    let rows = |prefix_use, max_seq_len| {
        let config = EngineConfig { prefix_use, max_seq_len, max_batch_size: 2, ..config() };
        let mut engine = engine(&loaded, config);
        engine.pin_prefix(&prefix).unwrap();
        let output = run(&mut engine, requests.clone());
        (output.statistics.prompt_tokens, tokens_by_row(output))
    };
    let shared = rows(PrefixUse::Shared, 100);
    assert_eq!(shared.1.len(), requests.len());
    assert_eq!(rows(PrefixUse::Copied, 100 + prefix.len()), shared);
    let dense = Loaded::packed(&stories(), &SingleProcess, false);
    let config = EngineConfig { prefix_use: PrefixUse::Copied, ..config() };
    let refused = Engine::new(&dense.model, &dense.tokenizer, &SingleProcess, config);
    assert!(matches!(refused, Err(Error::CopiedPrefix)));
}

#[test]
fn long_prompts_behind_a_prefix_are_read_in_blocks() {
    let loaded = loaded();
    let ids: Vec<u32> = (0..420u32).map(|i| 260 + (i * 37) % 200).collect();
    let config = EngineConfig { max_seq_len: 500, max_gen_len: 6, ..config() };
    let plain = run(&mut engine(&loaded, config.clone()), vec![request("row", ids.clone())]);
    let mut with_prefix = engine(&loaded, config);
    with_prefix.pin_prefix(&ids[..30]).unwrap();
    let pinned = run(&mut with_prefix, vec![request("row", ids)]);
    assert_eq!(pinned.statistics.prompt_tokens, 390);
    assert_eq!(pinned.row("row").tokens, plain.row("row").tokens);
}

#[test]
fn rows_end_at_stop_strings_and_keep_them() {
    let loaded = loaded();
    let requests = prompts(&loaded);
    let free = run(&mut engine(&loaded, config()), requests.clone());
    // Texts that begin inside of one token and end inside of another one.
    let stop_of = |id: &str| {
        let text: Vec<char> = free.row(id).text.chars().collect();
        text[20..27].iter().collect::<String>()
    };
    let stop_strings = vec![stop_of("row 0"), stop_of("row 2"), String::new()];
    let config = EngineConfig { stop_strings: stop_strings.clone(), ..config() };
    let output = run(&mut engine(&loaded, config), requests);
    let mut stopped = 0;
    for row in &output.finished {
        let whole = &free.row(&row.id).text;
        let ends = stop_strings[..2]
            .iter()
            .filter_map(|stop| whole.find(stop.as_str()).map(|at| at + stop.len()));
        let want = &whole[..ends.min().unwrap_or(whole.len())];
        assert_eq!(row.text, want);
        assert_eq!(output.streamed[&row.id], want);
        stopped += usize::from(row.finish_reason == FinishReason::Stop);
    }
    assert!(stopped >= 2);
}

#[test]
fn rows_end_at_any_eos_token_without_its_text() {
    let loaded = loaded();
    let requests = prompts(&loaded);
    let free = run(&mut engine(&loaded, config()), requests.clone());
    let eos = free.row("row 0").tokens[12];
    let config = EngineConfig { eos_token_ids: vec![2, eos], ..config() };
    let output = run(&mut engine(&loaded, config), requests);
    for row in &output.finished {
        let whole = &free.row(&row.id).tokens;
        let end = whole.iter().position(|&token| token == eos);
        assert_eq!(row.tokens, whole[..end.unwrap_or(whole.len())]);
        let reason = if end.is_some() { FinishReason::Eos } else { FinishReason::Length };
        assert_eq!(row.finish_reason, reason);
    }
    assert_eq!(output.row("row 0").finish_reason, FinishReason::Eos);
}

#[test]
fn requests_that_cannot_run_are_rejected_by_name() {
    let loaded = loaded();
    let mut requests = prompts(&loaded);
    requests.insert(1, request("long", vec![1; 200]));
    requests.insert(3, request("empty", Vec::new()));
    requests.push(request("just fits", vec![1; 199]));
    let output = run(&mut engine(&loaded, config()), requests);
    assert_eq!(output.finished.len(), TEXTS.len() + 1);
    let fits = output.row("just fits");
    assert_eq!((fits.tokens.len(), fits.finish_reason), (1, FinishReason::Length));
    let [long, empty] = &output.rejected[..] else { panic!("{:?}", output.rejected) };
    assert_eq!((long.0.as_str(), empty.0.as_str()), ("long", "empty"));
    assert!(long.1.contains("200 tokens") && long.1.contains("max_seq_len 200"), "{}", long.1);
    assert!(empty.1.contains("no tokens"), "{}", empty.1);
    assert_eq!(output.statistics.rejected, 2);
}

#[test]
fn rows_end_where_the_context_does() {
    let loaded = loaded();
    let config = EngineConfig { max_seq_len: 600, max_gen_len: 100, ..config() };
    let mut engine = engine(&loaded, config);
    engine.pin_prefix(&vec![403; 490]).unwrap();
    let output = run(&mut engine, vec![request("row", vec![403; 495])]);
    // The context is 512, so 22 tokens have room behind the prefix, 5 of them of the prompt.
    assert_eq!(output.row("row").tokens.len(), 17);
    let error = engine.pin_prefix(&vec![403; 512]).unwrap_err();
    assert!(matches!(error, Error::PrefixTooLong { tokens: 512, context: 512 }), "{error}");
}

#[test]
fn the_receiver_can_stop_a_run() {
    let loaded = loaded();
    let mut engine = engine(&loaded, config());
    let mut requests = prompts(&loaded).into_iter();
    let mut events = 0;
    let statistics = engine
        .run(&mut || requests.next(), &mut |_| {
            events += 1;
            if events >= 9 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    assert!(statistics.stopped && statistics.finished == 0 && statistics.output_tokens <= 12);
    // The engine starts afresh.
    let output = run(&mut engine, prompts(&loaded));
    assert_eq!(output.finished.len(), TEXTS.len());
}

/// A stop that comes with a rejected request, while nothing is under way, is a stop all the same.
#[test]
fn a_run_that_is_stopped_by_a_rejected_request_says_so() {
    let loaded = loaded();
    let mut engine = engine(&loaded, config());
    let mut requests = (0..3).map(|row| request(format!("{row}"), vec![403; 300]));
    let statistics = engine.run(&mut || requests.next(), &mut |_| ControlFlow::Break(())).unwrap();
    assert!(statistics.stopped && statistics.rejected == 1, "{statistics:?}");
}

/// Rows enter in the order of their requests, and the order of all events repeats.
#[test]
fn the_order_of_work_is_that_of_the_requests() {
    let loaded = loaded();
    let order = || {
        let mut engine = engine(&loaded, EngineConfig { max_batch_size: 2, ..config() });
        let (mut events, mut begun) = (Vec::new(), Vec::new());
        let mut requests = prompts(&loaded).into_iter();
        let mut sink = |event: Event<'_>| {
            if let Event::Token { id, .. } = &event
                && !begun.contains(&id.to_string())
            {
                begun.push(id.to_string());
            }
            events.push(format!("{event:?}").split(", seconds").next().unwrap().to_owned());
            ControlFlow::Continue(())
        };
        engine.run(&mut || requests.next(), &mut sink).unwrap();
        (begun, events)
    };
    let (begun, events) = order();
    let ids: Vec<String> = (0..TEXTS.len()).map(|row| format!("row {row}")).collect();
    assert_eq!(begun, ids);
    assert_eq!(order().1, events);
}

#[test]
fn settings_and_tokenizers_that_do_not_fit_are_errors() {
    let loaded = loaded();
    let refused =
        |config| match Engine::new(&loaded.model, &loaded.tokenizer, &SingleProcess, config) {
            Ok(_) => panic!("accepted"),
            Err(error) => error.to_string(),
        };
    assert!(
        refused(EngineConfig { max_batch_size: 0, ..config() }).contains("max_batch_size is 0")
    );
    assert!(refused(EngineConfig { max_gen_len: 0, ..config() }).contains("max_gen_len"));
    let sampling = Sampling::nucleus(1.0, 1.5);
    assert!(refused(EngineConfig { sampling, ..config() }).contains("top_p is 1.5"));
    let other = crate::support::load(&data("untied"), &dromedary_llama::LoadOptions::default());
    let error = Engine::new(&other, &loaded.tokenizer, &SingleProcess, config()).err().unwrap();
    assert!(error.to_string().contains("the tokenizer has 512 tokens"), "{error}");
}

#[test]
fn rows_whose_logits_are_not_numbers_fail_all_and_the_run_does_not() {
    let loaded = loaded();
    let _ = loaded.model.layers()[2].input_layernorm.weight.shallow_clone().fill_(f64::NAN);
    let mut engine = engine(&loaded, config());
    let requests = prompts(&loaded);
    let want: Vec<_> = requests.iter().map(|row| (row.id.clone(), 0)).collect();
    let output = run(&mut engine, requests);
    assert_eq!((output.finished.len(), output.failed), (0, want));
}
