//! The end of a run: what was trained, and the card beside it.

use std::path::PathBuf;

use dromedary_files::{AtomicDir, Manifest, write_atomic};
use dromedary_llama::{Llama, SaveOptions};
use tch::no_grad;

use crate::{
    config::TrainConfig,
    curves,
    error::Result,
    metrics::{CURVES_FILE, Line},
    model_card::ModelCard,
    prepared::Prepared,
    ranks::Ranks,
    trained::Trained,
};

/// Name of the folder under the output folder that holds the finished adapter.
pub const ADAPTER_DIR: &str = "adapter";
/// Name of the folder under the output folder that holds the trained model, where weights are trained.
pub const MODEL_DIR: &str = "model";
const CARD_FILE: &str = "README.md";

/// A run behind its last step.
pub(crate) struct Finished<'a> {
    pub(crate) config: &'a TrainConfig,
    pub(crate) prepared: &'a Prepared,
    pub(crate) model: &'a Llama,
    pub(crate) trained: &'a Trained,
    pub(crate) ranks: &'a Ranks<'a>,
    /// What the steps said, on the first rank.
    pub(crate) lines: Option<&'a [Line]>,
}

impl Finished<'_> {
    /// Writes the adapter, or the model where weights are trained, and the card; gives the folder. Every rank
    /// must call this.
    ///
    /// # Errors
    /// If a rank is gone, or the disk is full.
    pub(crate) fn publish(&self) -> Result<PathBuf> {
        let card = self.lines.map(|lines| self.card(lines));
        match self.config.full_finetune {
            true => self.publish_model(card.as_ref()),
            false => self.publish_adapter(card.as_ref()),
        }
    }

    fn card<'b>(&'b self, lines: &'b [Line]) -> ModelCard<'b> {
        let Self { config, prepared, trained, .. } = *self;
        ModelCard {
            config,
            schedule: &prepared.schedule,
            audit: &prepared.audit,
            inputs: &prepared.inputs,
            rows: [prepared.examples.len(), prepared.held_out.len()],
            kind: format!("{:?}", prepared.kind).to_lowercase(),
            num_parameters: trained.num_parameters(),
            lines,
        }
    }

    /// The trained model as a checkpoint of its own, in the kinds of the base's tensors.
    fn publish_model(&self, card: Option<&ModelCard<'_>>) -> Result<PathBuf> {
        let Self { config, prepared, model, ranks, .. } = *self;
        let path = config.output_dir.join(MODEL_DIR);
        if ranks.is_of_first_replica() {
            let tokenizer = Some(&config.data.tokenizer).filter(|path| **path != config.checkpoint);
            let options = SaveOptions {
                replace: true,
                tokenizer: tokenizer.cloned(),
                ..SaveOptions::new(&path, &config.checkpoint)
            };
            no_grad(|| model.save(prepared.base.specs()?, &options, ranks.tp()))?;
        }
        if let Some(card) = card {
            // Beside it: the folder's manifest is of what `llama` reads.
            write_atomic(config.output_dir.join(CARD_FILE), card.to_string().as_bytes())?;
        }
        Ok(path)
    }

    fn publish_adapter(&self, card: Option<&ModelCard<'_>>) -> Result<PathBuf> {
        let Self { config, trained, ranks, .. } = *self;
        let path = config.output_dir.join(ADAPTER_DIR);
        let dir = card.map(|_| AtomicDir::replace_existing(&path)).transpose()?;
        if ranks.is_of_first_replica() {
            trained.write_adapter(dir.as_ref().map(AtomicDir::path), ranks.tp())?;
        }
        let Some((dir, card)) = dir.zip(card) else { return Ok(path) };
        write_atomic(dir.path().join(CARD_FILE), card.to_string().as_bytes())?;
        write_atomic(dir.path().join(CURVES_FILE), curves::draw(card.lines).as_bytes())?;
        let manifest = Manifest::of_dir(dir.path())?;
        dir.commit(&manifest)?;
        Ok(path)
    }
}
