//! Forward and backward of a layer's halves in closed form, by this crate's kernels.
//!
//! Autograd keeps every intermediate value and passes over it again for every operation. Here each half
//! keeps what its gradient needs and no more, products go straight into their places, and norms and
//! activations are computed again, which costs less than to keep them. What libtorch's autograd gives is
//! the reference, and the path on every other device.

// Shapes: T = tokens, C = hidden_size, I = in and O = out features of a linear layer, r = LoRA rank, R =
// sum of the ranks of its parts, H = query heads and KV = K/V heads of this rank, D = head_dim, F = this
// rank's columns of intermediate_size.

mod factors;
mod linear;

use std::cell::RefCell;

use dromedary_torch_ext::{F32Buffer, Rows};
use linear::{Through, dense, matrix};
use tch::{Device, Kind, Tensor};

use crate::{
    Linear, Llama, Result, RmsNorm, RotaryAt, Weight,
    block::Layer,
    kernels::{Buffer, Kernels, Panels, QkvRows, Workspace},
};

/// Forward and backward of layers in f32 on a CPU, with the memory that they use again and again.
#[derive(Debug)]
pub struct ClosedForm {
    kernels: Kernels,
    workspace: Workspace,
    /// Weights that adapters are added to, or that are converted.
    weights: Workspace,
    /// Numbers of the largest linear layer that is not kept in f32. One piece of memory serves all of these,
    /// one after the other: fresh ones of many sizes would tear the allocator's heap into pieces.
    largest_converted: usize,
    panels: RefCell<Panels>,
    trains_weights: bool,
}

/// A layer, and the rows of a micro-batch that pass through it.
#[derive(Debug, Clone, Copy)]
pub struct LayerPass<'a> {
    /// The layer with its adapters.
    pub layer: &'a Layer,
    /// Rotation of each of the T positions.
    pub rotary_at: &'a RotaryAt,
    /// Length of each row; they sum to T.
    pub lengths: &'a [i64],
}

/// What the attention half keeps for backward besides its input.
#[derive(Debug)]
pub struct AttentionState {
    qkv: Buffer,             // (T, H + 2 KV, D), rotated
    out: Buffer,             // (T, H, D)
    sums: Buffer,            // (T, H)
    low_qkv: Option<Buffer>, // (T, R)
    low_out: Option<Buffer>, // (T, R)
}

/// What the MLP half keeps for backward besides its input.
#[derive(Debug)]
pub struct MlpState {
    gate_up: Buffer,             // (T, 2 F)
    low_gate_up: Option<Buffer>, // (T, R)
    low_down: Option<Buffer>,    // (T, R)
}

/// Gradients that backward through a half gives.
#[derive(Debug)]
pub struct HalfGradients {
    /// Of the half's input, not counting the residual: (T, C).
    pub input: Tensor,
    /// Of what is trained, in the order of the forward pass: where weights are trained the norm's and
    /// those of the fused projections, else A and B of each adapter.
    pub trained: Vec<Tensor>,
}

impl ClosedForm {
    /// For a model whose layers are computed in f32 on the CPU, and not packed; nothing for another.
    /// With `trains_weights` backward gives gradients of weights, else of adapters.
    pub fn of(model: &Llama, trains_weights: bool) -> Option<Self> {
        let numbers = |linear: &Linear| match &linear.weight {
            Weight::Dense(weight) if weight.kind() == Kind::Float => 0,
            weight => (weight.size().0 * weight.size().1) as usize,
        };
        let linears = model.layers().iter().flat_map(Layer::linears);
        let largest_converted = linears.map(numbers).max().unwrap_or(0);
        let fits = model.device() == Device::Cpu && model.kind() == Kind::Float && !model.packs();
        fits.then(|| Self {
            kernels: Kernels::detect(),
            workspace: Workspace::default(),
            weights: Workspace::default(),
            largest_converted,
            panels: RefCell::default(),
            trains_weights,
        })
    }

    /// This rank's partial sum of the attention half, as [`crate::block::attention_partial`] gives it,
    /// and what backward needs.
    ///
    /// # Shapes
    /// x: `(T, C)`, result: `(T, C)`.
    ///
    /// # Errors
    /// `x` is not f32 on the CPU, no memory.
    pub fn attention(&self, pass: LayerPass<'_>, x: &Tensor) -> Result<(Tensor, AttentionState)> {
        let mut state = self.attention_state(pass, x)?;
        let o_proj = &pass.layer.o_proj;
        let (out, low) = self.output(o_proj, &state.out)?;
        state.low_out = low;
        Ok((out, state))
    }

    /// All of the attention half but its last product.
    fn attention_state(&self, pass: LayerPass<'_>, x: &Tensor) -> Result<AttentionState> {
        let LayerPass { layer, rotary_at, lengths } = pass;
        let heads = &layer.heads;
        let (h, kv, d) = (heads.n_local_heads(), heads.n_local_kv_heads(), heads.head_dim);
        let rows = Rows::of(x)?;
        let tokens = rows.len();
        let normed = self.norm(&layer.input_layernorm, rows.values())?; // (T, C)
        let mut qkv = self.workspace.take(tokens, ((h + 2 * kv) * d) as usize)?;
        let low_qkv = self.linear(&layer.qkv_proj, &normed, &mut qkv)?;
        let [cos, sin] = rotary_at.parts();
        let (cos, sin) = (Rows::of(cos)?.values(), Rows::of(sin)?.values());
        self.kernels.rotate_rows(heads, (cos, sin), &mut qkv, false)?;
        let mut out = self.workspace.take(tokens, (h * d) as usize)?;
        let mut sums = self.workspace.take(tokens, h as usize)?;
        let of = QkvRows { heads, values: &qkv, lengths };
        self.kernels.attend(of, &mut out, &mut sums)?;
        Ok(AttentionState { qkv, out, sums, low_qkv, low_out: None })
    }

    /// Backward through the attention half: `grad`, `(T, C)`, is that of its partial sum. What forward
    /// did not leave is computed again.
    ///
    /// # Errors
    /// As [`ClosedForm::attention`].
    pub fn attention_backward(
        &self,
        pass: LayerPass<'_>,
        x: &Tensor,
        state: Option<AttentionState>,
        grad: &Tensor,
    ) -> Result<HalfGradients> {
        let state = match state {
            Some(state) => state,
            None => self.attention_state(pass, x)?,
        };
        let AttentionState { qkv, out, sums, low_qkv, low_out } = state;
        let LayerPass { layer, rotary_at, lengths } = pass;
        let heads = &layer.heads;
        let grad = grad.f_contiguous()?;
        let (x, grad) = (Rows::of(x)?.values(), Rows::of(&grad)?.values());

        let mut of_out = Vec::new();
        let mut grad_out = self.workspace.take(out.len() / out.width(), out.width())?; // (T, H, D)
        let through = Through { input: &out, low: low_out, grad };
        self.linear_backward(&layer.o_proj, through, &mut grad_out, &mut of_out)?;

        let mut grad_qkv = self.workspace.take(qkv.len() / qkv.width(), qkv.width())?;
        let of = QkvRows { heads, values: &qkv, lengths };
        self.kernels.attend_backward(of, (&out, &sums), &grad_out, &mut grad_qkv)?;
        drop((qkv, out, sums, grad_out));
        let [cos, sin] = rotary_at.parts();
        let (cos, sin) = (Rows::of(cos)?.values(), Rows::of(sin)?.values());
        self.kernels.rotate_rows(heads, (cos, sin), &mut grad_qkv, true)?;

        let normed = self.norm(&layer.input_layernorm, x)?; // (T, C)
        let mut trained = Vec::new();
        let through = Through { input: &normed, low: low_qkv, grad: &grad_qkv };
        let input = self.input_gradient(
            (&layer.input_layernorm, x),
            &layer.qkv_proj,
            through,
            &mut trained,
        )?;
        trained.append(&mut of_out);
        Ok(HalfGradients { input, trained })
    }

    /// This rank's partial sum of the MLP half, as [`crate::block::mlp_partial`] gives it, and what
    /// backward needs.
    ///
    /// # Shapes
    /// x: `(T, C)`, result: `(T, C)`.
    ///
    /// # Errors
    /// As [`ClosedForm::attention`].
    pub fn mlp(&self, layer: &Layer, x: &Tensor) -> Result<(Tensor, MlpState)> {
        let mut state = self.mlp_state(layer, x)?;
        let gated = self.gated(&state.gate_up)?; // (T, F)
        let (out, low) = self.output(&layer.down_proj, &gated)?;
        state.low_down = low;
        Ok((out, state))
    }

    /// Gate and up.
    fn mlp_state(&self, layer: &Layer, x: &Tensor) -> Result<MlpState> {
        let rows = Rows::of(x)?;
        let normed = self.norm(&layer.post_attention_layernorm, rows.values())?; // (T, C)
        let width = layer.gate_up_proj.weight.size().0 as usize;
        let mut gate_up = self.workspace.take(rows.len(), width)?;
        let low_gate_up = self.linear(&layer.gate_up_proj, &normed, &mut gate_up)?;
        Ok(MlpState { gate_up, low_gate_up, low_down: None })
    }

    /// Backward through the MLP half, as [`ClosedForm::attention_backward`].
    ///
    /// # Errors
    /// As [`ClosedForm::attention`].
    pub fn mlp_backward(
        &self,
        layer: &Layer,
        x: &Tensor,
        state: Option<MlpState>,
        grad: &Tensor,
    ) -> Result<HalfGradients> {
        let state = match state {
            Some(state) => state,
            None => self.mlp_state(layer, x)?,
        };
        let MlpState { mut gate_up, low_gate_up, low_down } = state;
        let grad = grad.f_contiguous()?;
        let (x, grad) = (Rows::of(x)?.values(), Rows::of(&grad)?.values());
        let width = gate_up.width() / 2;

        let gated = self.gated(&gate_up)?; // (T, F)
        let mut of_down = Vec::new();
        let mut grad_gated = self.workspace.take(gated.len() / width, width)?; // (T, F)
        let through = Through { input: &gated, low: low_down, grad };
        self.linear_backward(&layer.down_proj, through, &mut grad_gated, &mut of_down)?;
        drop(gated);
        self.kernels.silu_mul_backward(&grad_gated, width, &mut gate_up)?;
        drop(grad_gated);

        let norm = &layer.post_attention_layernorm;
        let normed = self.norm(norm, x)?; // (T, C)
        let mut trained = Vec::new();
        let through = Through { input: &normed, low: low_gate_up, grad: &gate_up };
        let input = self.input_gradient((norm, x), &layer.gate_up_proj, through, &mut trained)?;
        trained.append(&mut of_down);
        Ok(HalfGradients { input, trained })
    }

    /// `x W^T` of a layer, adapters included.
    ///
    /// # Shapes
    /// x: `(T, I)`, result: `(T, O)`.
    ///
    /// # Errors
    /// As [`ClosedForm::attention`].
    pub fn project(&self, linear: &Linear, x: &Tensor) -> Result<Tensor> {
        let x = x.f_contiguous()?;
        Ok(self.output(linear, Rows::of(&x)?.values())?.0)
    }

    /// The gradient of a layer's input from that of its output, not counting adapters.
    ///
    /// # Shapes
    /// grad: `(T, O)`, result: `(T, I)`.
    ///
    /// # Errors
    /// As [`ClosedForm::attention`].
    pub fn project_backward(&self, linear: &Linear, grad: &Tensor) -> Result<Tensor> {
        let grad = grad.f_contiguous()?;
        let weight = dense(&linear.weight)?;
        self.product(matrix(&grad)?, matrix(&weight)?)
    }

    /// Adds the gradient of a layer's weight, `grad^T x`, to `sum`.
    ///
    /// # Shapes
    /// x: `(T, I)`, grad: `(T, O)`, sum: `(O, I)`.
    ///
    /// # Errors
    /// As [`ClosedForm::attention`].
    pub fn add_weight_gradient(&self, x: &Tensor, grad: &Tensor, sum: &mut Tensor) -> Result<()> {
        let (x, grad) = (x.f_contiguous()?, grad.f_contiguous()?);
        let _ = sum.f_add_(&self.product(matrix(&grad)?.t(), matrix(&x)?)?)?;
        Ok(())
    }

    fn norm(&self, norm: &RmsNorm, x: &[f32]) -> Result<Buffer> {
        let weight = Rows::of(&norm.weight)?.values();
        let mut normed = self.workspace.take(x.len() / weight.len(), weight.len())?;
        self.kernels.norm_rows(x, (weight, norm.eps), &mut normed)?;
        Ok(normed)
    }

    fn gated(&self, gate_up: &Buffer) -> Result<Buffer> {
        let width = gate_up.width() / 2;
        let mut gated = self.workspace.take(gate_up.len() / gate_up.width(), width)?;
        self.kernels.silu_mul_rows(gate_up, width, &mut gated)?;
        Ok(gated)
    }

    /// A layer's result as a tensor of its own, and the low-rank values of its adapters.
    fn output(&self, linear: &Linear, x: &[f32]) -> Result<(Tensor, Option<Buffer>)> {
        let (out, depth) = linear.weight.size();
        let mut result = F32Buffer::zeros(&[(x.len() / depth as usize) as i64, out])?;
        let low = self.linear(linear, x, result.values_mut())?;
        Ok((result.into_tensor(), low))
    }

    /// The gradient of a half's input: through its first projections, then through its norm.
    fn input_gradient(
        &self,
        (norm, x): (&RmsNorm, &[f32]),
        linear: &Linear,
        through: Through<'_>,
        trained: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        let weight = Rows::of(&norm.weight)?.values();
        let mut grad = F32Buffer::zeros(&[(x.len() / weight.len()) as i64, weight.len() as i64])?;
        let mut of_linear = Vec::new();
        self.linear_backward(linear, through, grad.values_mut(), &mut of_linear)?;
        if self.trains_weights {
            trained.push(norm_weight_gradient(norm, x, grad.values())?);
        }
        trained.append(&mut of_linear);
        self.kernels.norm_backward(x, (weight, norm.eps), grad.values_mut())?;
        Ok(grad.into_tensor())
    }
}

/// `sum over tokens of grad x / sqrt(mean(x^2) + eps)`: (C).
fn norm_weight_gradient(norm: &RmsNorm, x: &[f32], grad: &[f32]) -> Result<Tensor> {
    let width = Rows::of(&norm.weight)?.values().len();
    let mut sum = F32Buffer::zeros(&[width as i64])?;
    for (x, grad) in x.chunks_exact(width).zip(grad.chunks_exact(width)) {
        let squares: f32 = x.iter().map(|x| x * x).sum();
        let scale = 1.0 / (squares / width as f32 + norm.eps as f32).sqrt();
        for ((sum, x), grad) in sum.values_mut().iter_mut().zip(x).zip(grad) {
            *sum += scale * x * grad;
        }
    }
    Ok(sum.into_tensor())
}
