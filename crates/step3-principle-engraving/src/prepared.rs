//! What a run reads before the model is loaded, and what follows from it.

use dromedary_llama::{Checkpoint, LoraConfig, check_tokenizer, select_kind, select_nf4};
use dromedary_parallel::{Communicator, check_agreements};
use dromedary_tokenizer::Tokenizer;
use tch::{Device, Kind};

use crate::{
    audit::Audit, batches::Batches, collate::Example, config::TrainConfig, dataset::Dataset,
    error::Result, held_out, model_card::Inputs, schedule::Schedule,
};

/// Rows, their order and schedule, and the base model on disk: all that settings and files decide.
pub(crate) struct Prepared {
    /// What is known of all rows of the data set.
    pub(crate) audit: Audit,
    /// Rows to train on.
    pub(crate) examples: Vec<Example>,
    /// Rows to compute a loss on between steps.
    pub(crate) held_out: Vec<Example>,
    /// The base model.
    pub(crate) base: Checkpoint,
    /// Hashes of all files.
    pub(crate) inputs: Inputs,
    /// The order of the rows.
    pub(crate) batches: Batches,
    /// Learning rates, and with them the steps.
    pub(crate) schedule: Schedule,
    /// Kind of the weights that are computed with.
    pub(crate) kind: Kind,
    /// The frozen weights stay in four bits.
    pub(crate) nf4: bool,
    /// Hash of what the steps depend on.
    pub(crate) config_hash: String,
}

impl Prepared {
    /// Reads what `config` names, for a model on `device`.
    ///
    /// # Errors
    /// If a file cannot be read, a row is bad, or settings and files do not go together.
    pub(crate) fn read(config: &TrainConfig, device: Device) -> Result<Self> {
        let tokenizer = Tokenizer::open(&config.data.tokenizer)?;
        let (audit, examples, held_out) = read_rows(config, &tokenizer)?;
        let base = Checkpoint::open(&config.checkpoint)?;
        check_tokenizer(base.config(), &tokenizer)?;
        let inputs = Inputs::of(config, base.fingerprint()?, tokenizer.fingerprint())?;
        let lengths = examples.iter().map(|example| example.input_ids.len()).collect();
        let batches = Batches::new(config.batches.clone(), lengths);
        let schedule = config.schedule.over(total_steps(config, &batches))?;
        let kind = select_kind(&config.dtype, device, base.dtype())?;
        let nf4 = keeps_nf4(config, &base, device)?;
        let stored = format!("{kind:?}{}", if nf4 { " nf4" } else { "" });
        let hashed = format!("{:?} {stored}", inputs.fingerprints());
        let config_hash = config_hash(config, &schedule, &hashed, &examples);
        Ok(Self {
            audit,
            examples,
            held_out,
            base,
            inputs,
            batches,
            schedule,
            kind,
            nf4,
            config_hash,
        })
    }

    /// All ranks must have been started with the same settings on the same data. Every rank must call this.
    ///
    /// # Errors
    /// If a rank has other ones, or is gone.
    pub(crate) fn agree(&self, config: &TrainConfig, world: &dyn Communicator) -> Result<()> {
        // What each rank may have of its own.
        let shared = TrainConfig { device: String::new(), threads: None, ..config.clone() };
        Ok(check_agreements(
            world,
            &[
                ("the settings".to_owned(), format!("{shared:?}")),
                ("the inputs".to_owned(), format!("{:?}", self.inputs.fingerprints())),
                ("the hash of settings and rows".to_owned(), self.config_hash.clone()),
            ],
        )?)
    }
}

/// Rows as tokens: what is known of all, those to train on, and those held out. Rows that teach nothing are
/// refused by name, or left out where asked for.
fn read_rows(
    config: &TrainConfig,
    tokenizer: &Tokenizer,
) -> Result<(Audit, Vec<Example>, Vec<Example>)> {
    let data = &config.data;
    let dataset = Dataset::read(&data.dataset, data.max_train_samples, data, tokenizer)?;
    dataset.audit.log("data set");
    dataset.check(data.drop_empty)?;
    let Dataset { examples, audit, .. } = dataset;
    let (examples, held_out) = match &config.eval {
        Some(eval) => held_out::split(examples, eval, data, config.seed, tokenizer)?,
        None => (examples, Vec::new()),
    };
    Ok((audit, examples, held_out))
}

fn total_steps(config: &TrainConfig, batches: &Batches) -> u64 {
    let of_epochs = || config.num_train_epochs * batches.steps_per_epoch() as f64;
    config.max_steps.unwrap_or_else(|| of_epochs().ceil() as u64)
}

/// Whether the frozen weights stay in four bits, as the base has them.
fn keeps_nf4(config: &TrainConfig, base: &Checkpoint, device: Device) -> Result<bool> {
    let is_stored = base.stores_nf4();
    if config.bits == Some(4) && !is_stored {
        tracing::warn!(
            "--bits 4: {} is not stored in four bits and is held in --dtype; `llama quantize --nf4` \
             makes a base that stays so",
            config.checkpoint.display()
        );
    }
    let may = !config.full_finetune && matches!(config.bits, None | Some(4));
    Ok(may && select_nf4(None, device, is_stored)?)
}

/// Hash of what the steps depend on, the hashes of all inputs among it: a checkpoint of another hash cannot be
/// gone on from.
fn config_hash(
    config: &TrainConfig,
    schedule: &Schedule,
    inputs: &str,
    examples: &[Example],
) -> String {
    let mut hasher = blake3::Hasher::new();
    // The base's path is for people; its fingerprint is among the inputs.
    let lora = LoraConfig { base_model_name_or_path: None, ..config.lora.clone() };
    let settings = format!(
        "{:?}",
        (
            (lora, config.full_finetune),
            (&config.batches, schedule, &config.adamw, config.seed),
            inputs,
        )
    );
    hasher.update(settings.as_bytes());
    for example in examples {
        for range in &example.learned {
            hasher.update(&(range.start as u64).to_le_bytes());
            hasher.update(&(range.end as u64).to_le_bytes());
        }
        hasher.update(&(example.input_ids.len() as u64).to_le_bytes());
        for id in &example.input_ids {
            hasher.update(&id.to_le_bytes());
        }
    }
    hasher.finalize().to_hex()[..32].to_owned()
}
