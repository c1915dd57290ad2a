use std::path::{Path, PathBuf};

use dromedary_llama::{Checkpoint, Llama, LoadOptions, LoraConfig};
use dromedary_principle_engraving::{AdamWConfig, Trained};

/// stories260k: a real trained LLaMA of 260,032 parameters with grouped-query attention.
pub(crate) fn stories260k() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../llama/tests/data/stories260k")
}

pub(crate) fn load(dir: &Path) -> Llama {
    tch::set_num_threads(1);
    let options = LoadOptions { pack: false, ..LoadOptions::default() };
    Llama::load(&Checkpoint::open(dir).unwrap(), &options).unwrap()
}

pub(crate) fn lora_config(r: i64) -> LoraConfig {
    LoraConfig { r, ..LoraConfig::default() }
}

/// Adapters on all layers with A and B both random, so that no gradient is 0 by construction.
pub(crate) fn attach_random(model: &mut Llama, r: i64) -> Trained {
    let trained = Trained::attach(model, &lora_config(r), AdamWConfig::default(), 7).unwrap();
    tch::manual_seed(11);
    tch::no_grad(|| {
        for entry in 0..trained.optimizer.entries().len() {
            let noise = trained.leaf(entry).randn_like() * 0.05;
            let _ = trained.leaf(entry).detach().g_add_(&noise);
        }
    });
    trained
}
