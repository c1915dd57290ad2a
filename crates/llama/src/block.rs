//! One transformer layer as two local halves; who calls them adds the residual and the all-reduce.

// Shapes: T = tokens of all sequences, flattened; C = hidden_size, H = query heads and KV = K/V heads
// of this rank, D = head_dim, F = this rank's columns of intermediate_size.

use tch::Tensor;

pub use crate::attention::causal_attention;
pub use crate::heads::{HeadRun, Heads};
use crate::{
    Result,
    kernels::Kernels,
    linear::Linear,
    model::{ReplaceWeight, replace_single},
    norm::RmsNorm,
    rotary::RotaryAt,
};

/// The weights of one layer, as this rank holds them.
#[derive(Debug)]
pub struct Layer {
    /// Norm before the attention.
    pub input_layernorm: RmsNorm,
    /// `q_proj`, `k_proj` and `v_proj` in one product.
    pub qkv_proj: Linear,
    /// Output of the attention; row-parallel.
    pub o_proj: Linear,
    /// Norm before the MLP.
    pub post_attention_layernorm: RmsNorm,
    /// `gate_proj` and `up_proj` in one product.
    pub gate_up_proj: Linear,
    /// Output of the MLP; row-parallel.
    pub down_proj: Linear,
    /// The attention heads of this rank.
    pub heads: Heads,
    /// What computes between the linear layers where no gradient is asked for; libtorch's
    /// operations otherwise.
    pub(crate) kernels: Option<Kernels>,
}

impl Layer {
    /// The linear layers, in the order of the forward pass.
    pub fn linears(&self) -> [&Linear; 4] {
        [&self.qkv_proj, &self.o_proj, &self.gate_up_proj, &self.down_proj]
    }

    /// See [`crate::Llama::replace_weights`].
    pub(crate) fn replace_weights(
        &mut self,
        module: &str,
        replace: ReplaceWeight<'_>,
    ) -> Result<()> {
        let norm = format!("{module}.input_layernorm.weight");
        replace_single(norm, &mut self.input_layernorm.weight, replace)?;
        let attention = format!("{module}.self_attn.");
        self.qkv_proj.replace_weight(&attention, replace)?;
        self.o_proj.replace_weight(&attention, replace)?;
        let norm = format!("{module}.post_attention_layernorm.weight");
        replace_single(norm, &mut self.post_attention_layernorm.weight, replace)?;
        let mlp = format!("{module}.mlp.");
        self.gate_up_proj.replace_weight(&mlp, replace)?;
        self.down_proj.replace_weight(&mlp, replace)
    }

    fn kernels(&self, x: &Tensor) -> Option<Kernels> {
        self.kernels.filter(|_| !x.requires_grad())
    }
}

/// What attends: given rotated queries `(T, H, D)`, rotated keys and values `(T, KV, D)` of the new
/// tokens, it gives the attention `(T, H, D)` over whatever those tokens may see.
pub type Attend<'a> = &'a mut dyn FnMut(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

/// This rank's partial sum of `o_proj(attention(input_layernorm(x)))`, without the residual.
///
/// The whole is the sum over the ranks of the group; no collective is called here.
///
/// # Shapes
/// x: `(T, C)`, `rotary_at`: of T tokens, result: `(T, C)`.
///
/// # Errors
/// Those of `attend`; libtorch refused an operation, as when memory ends.
pub fn attention_partial(
    layer: &Layer,
    x: &Tensor,
    rotary_at: &RotaryAt,
    attend: Attend<'_>,
) -> Result<Tensor> {
    let heads = &layer.heads;
    let (h, kv) = (heads.n_local_heads(), heads.n_local_kv_heads());
    let qkv = layer.qkv_proj.forward(&layer.input_layernorm.forward(x))?;
    let qkv = qkv.view([-1, h + 2 * kv, heads.head_dim]); // (T, H + 2 KV, D)
    let qk = qkv.narrow(1, 0, h + kv); // (T, H + KV, D)
    let qk = match layer.kernels(&qk) {
        Some(kernels) => kernels.rotate(&qk, rotary_at.parts())?,
        None => rotary_at.rotate(&qk),
    }; // (T, H + KV, D)
    let out = attend(&qk.narrow(1, 0, h), &qk.narrow(1, h, kv), &qkv.narrow(1, h + kv, kv))?;
    layer.o_proj.forward(&out.reshape([-1, h * heads.head_dim])) // (T, C)
}

/// This rank's partial sum of `down_proj(silu(gate_proj(y)) * up_proj(y))` with
/// `y = post_attention_layernorm(x)`, without the residual.
///
/// The whole is the sum over the ranks of the group; no collective is called here.
///
/// # Shapes
/// x: `(T, C)`, result: `(T, C)`.
///
/// # Errors
/// libtorch refused an operation, as when memory ends.
pub fn mlp_partial(layer: &Layer, x: &Tensor) -> Result<Tensor> {
    let gate_up = layer.gate_up_proj.forward(&layer.post_attention_layernorm.forward(x))?; // (T, 2 F)
    let gated = match layer.kernels(&gate_up) {
        Some(kernels) => kernels.silu_mul(&gate_up)?,
        None => {
            let halves = gate_up.chunk(2, -1); // 2 x (T, F)
            halves[0].silu() * &halves[1]
        }
    }; // (T, F)
    layer.down_proj.forward(&gated) // (T, C)
}
