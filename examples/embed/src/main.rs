//! Answers the first prompts of a file with a LLaMA, as a library user would.
//!
//! `cargo run --release -- CHECKPOINT_DIR PROMPTS.json [ROWS]`

use std::{env, error::Error, ops::ControlFlow, path::PathBuf};

use dromedary_llama::{
    Checkpoint, Llama, LoadOptions, eos_token_ids,
    generation::{Engine, EngineConfig, Event, Request, Sampling},
};
use dromedary_parallel::SingleProcess;
use dromedary_records::read_prompts;
use dromedary_tokenizer::Tokenizer;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = env::args().skip(1);
    let usage = "usage: embed CHECKPOINT_DIR PROMPTS.json [ROWS]";
    let checkpoint: PathBuf = args.next().ok_or(usage)?.into();
    let prompts: PathBuf = args.next().ok_or(usage)?.into();
    let rows: usize = args.next().map_or(Ok(2), |rows| rows.parse())?;

    let tokenizer = Tokenizer::open(&checkpoint)?;
    let model = Llama::load(&Checkpoint::open(&checkpoint)?, &LoadOptions::default())?;
    let config = EngineConfig {
        max_batch_size: rows,
        max_seq_len: 256,
        max_gen_len: 48,
        sampling: Sampling::nucleus(0.7, 0.95),
        stop_strings: vec!["\n\n".to_owned()],
        eos_token_ids: eos_token_ids(&checkpoint, &tokenizer)?,
        ..EngineConfig::default()
    };
    let mut engine = Engine::new(&model, &tokenizer, &SingleProcess, config)?;

    let prompts = read_prompts(&prompts)?.take(rows).collect::<Result<Vec<_>, _>>()?;
    let mut requests = prompts.iter().map(|prompt| Request {
        id: prompt.id.clone(),
        tokens: tokenizer.encode_with_bos(&prompt.instruction),
        seed: 0,
    });
    engine.run(&mut || requests.next(), &mut |event| {
        match event {
            Event::Token { .. } => {}
            Event::Finished(row) => println!("{} [{}]{}", row.id, row.finish_reason, row.text),
            Event::Rejected { id, reason } => println!("{id} [rejected] {reason}"),
            Event::Failed { id, position } => {
                println!("{id} [failed] the logits of its output token {position} are not finite");
            }
        }
        ControlFlow::Continue(())
    })?;
    Ok(())
}
