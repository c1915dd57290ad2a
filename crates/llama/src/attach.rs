//! A model with an adapter beside its weights.

use tch::Tensor;

use crate::{AdapterFile, Llama, Lora, LoraPair, Result, Shard};

impl Llama {
    /// Puts an adapter beside the weights: each rank takes the rows of `lora_B` or the columns of `lora_A`
    /// that belong to its slices. The model computes as if the adapter had been merged into it.
    ///
    /// # Errors
    /// As [`AdapterFile::check_fits`]; what reading can meet.
    pub fn attach(&mut self, adapter: &AdapterFile) -> Result<()> {
        adapter.check_fits(self.config())?;
        let (device, kind) = (self.device(), self.kind());
        let plan = self.rank_plan().clone();
        for (module, part) in self.linears_mut() {
            if !adapter.has(&module) {
                continue;
            }
            let LoraPair { lora_a, lora_b } = slices(adapter.read(&module)?, &plan.shard(&module))?;
            let place = |factor: Tensor| {
                Ok::<_, crate::Error>(factor.f_to_device(device)?.f_to_kind(kind)?)
            };
            let (a, b) = (place(lora_a)?, place(lora_b)?);
            part.lora = Some(Lora { a, b, scaling: adapter.config().scaling(), dropout: None });
        }
        Ok(())
    }
}

/// The factors of a rank's slice of a weight.
fn slices(pair: LoraPair, shard: &Shard) -> Result<LoraPair> {
    let LoraPair { lora_a, lora_b } = pair;
    Ok(match shard {
        Shard::Replicated => LoraPair { lora_a, lora_b },
        Shard::Rows(slice) => {
            let rows = slice.range();
            let lora_b = lora_b.f_narrow(0, rows.start, rows.end - rows.start)?.f_contiguous()?;
            LoraPair { lora_a, lora_b }
        }
        Shard::Columns(slice) => {
            let columns = slice.range();
            let lora_a = lora_a.f_narrow(1, columns.start, columns.end - columns.start)?;
            LoraPair { lora_a: lora_a.f_contiguous()?, lora_b }
        }
    })
}
