//! A model with an adapter beside its weights.

use tch::Tensor;

use crate::{AdapterFile, Error, Llama, Lora, LoraPair, Result, TrainedTensor};

impl Llama {
    /// Puts an adapter beside the weights: each rank takes the rows of `lora_B` or the columns of `lora_A`
    /// that belong to its slices. The model computes as if the adapter had been merged into it.
    ///
    /// # Errors
    /// As [`AdapterFile::check_fits`]; what reading can meet.
    pub fn attach(&mut self, adapter: &AdapterFile) -> Result<()> {
        adapter.check_fits(self.config())?;
        let (device, kind, tp_rank) = (self.device(), self.kind(), self.tp_rank());
        let plan = self.plan().clone();
        for (module, part) in self.linears_mut() {
            if !adapter.has(&module) {
                continue;
            }
            let LoraPair { lora_a, lora_b } = adapter.read(&module)?;
            let place = |factor: &Tensor, tensor| {
                let slice = match plan.trained_part(tp_rank, &module, tensor) {
                    Some(part) => part.shard().narrow(factor)?.f_contiguous()?,
                    None => factor.shallow_clone(),
                };
                Ok::<_, Error>(slice.f_to_device(device)?.f_to_kind(kind)?)
            };
            let a = place(&lora_a, TrainedTensor::LoraA)?;
            let b = place(&lora_b, TrainedTensor::LoraB)?;
            part.lora = Some(Lora { a, b, scaling: adapter.config().scaling(), dropout: None });
        }
        Ok(())
    }
}
