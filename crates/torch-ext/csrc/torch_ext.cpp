// libtorch operations that tch does not bind.
//
// Every function returns nullptr when it worked, else a malloc'ed one-line message that the caller
// frees with free(3): no exception crosses into Rust. New tensors are handed over as owned
// pointers, as torch-sys does it.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

using at::Tensor;

namespace {

// What libtorch says after the first line is a C++ trace, which helps no user of the library.
char *one_line(const char *message) noexcept {
  const char *end = std::strchr(message, '\n');
  return end ? strndup(message, end - message) : strdup(message);
}

template <class F>
char *guarded(F &&body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const c10::Error &error) {
    return one_line(error.what_without_backtrace());
  } catch (const std::exception &error) {
    return one_line(error.what());
  } catch (...) {
    return strdup("unknown C++ exception");
  }
}

// oneDNN chooses the layout for an expected number of rows. A weight packed for 32 is as fast at
// 1 row and at 128 as one packed for these counts, while one packed for 1 loses half at 128.
constexpr int64_t PACKED_FOR_ROWS = 32;

// The operations live in the namespace `mkldnn`, not `aten`, so no header declares them; a build
// of libtorch without oneDNN has no such operation and the look-up throws.
Tensor reorder_weight(const Tensor &weight) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("mkldnn::_reorder_linear_weight", "")
                       .typed<Tensor(const Tensor &, std::optional<int64_t>)>();
  return op.call(weight, PACKED_FOR_ROWS);
}

Tensor linear_pointwise(const Tensor &x, const Tensor &packed) {
  static auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
          .typed<Tensor(const Tensor &, const Tensor &, const std::optional<Tensor> &,
                        std::string_view, c10::List<std::optional<at::Scalar>>,
                        std::optional<std::string_view>)>();
  return op.call(x, packed, std::nullopt, "none", c10::List<std::optional<at::Scalar>>(), "");
}

// The raw operations have no autograd kernel: libtorch would return an output that says it
// requires a gradient, print a warning in backward and drop the gradient.
void refuse_grad(const Tensor &t, const char *what) {
  TORCH_CHECK(!(at::GradMode::is_enabled() && t.requires_grad()), what,
              " has no gradient: call it under no_grad");
}

// oneDNN's own message for a mismatch is "could not create a primitive descriptor".
void check_linear(const Tensor &x, const Tensor &packed) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.device().is_cpu() && !x.is_mkldnn(),
              "packed linear wants a dense f32 CPU input, got ", x.toString());
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == packed.size(1), "packed linear: the input is ",
              x.sizes(), ", the weight ", packed.sizes());
}

Tensor packed_linear(const Tensor &x, const Tensor &packed) {
  // oneDNN makes no primitive for an empty batch.
  if (x.numel() == 0) {
    auto sizes = x.sizes().vec();
    sizes.back() = packed.size(0);
    return at::zeros(sizes, x.options());
  }
  return linear_pointwise(x, packed);
}

std::vector<Tensor> gathered(const Tensor *const *tensors, size_t n) {
  std::vector<Tensor> result;
  result.reserve(n);
  for (size_t i = 0; i < n; i++) result.push_back(*tensors[i]);
  return result;
}

}  // namespace

extern "C" {

// tch knows only matmul, which re-packs the weight in every call.
char *te_pack_weight(const Tensor *weight, Tensor **out) {
  return guarded([&] {
    TORCH_CHECK(weight->defined() && weight->dim() == 2 && weight->scalar_type() == at::kFloat &&
                    weight->device().is_cpu() && !weight->is_mkldnn(),
                "packing wants a dense 2-d f32 CPU tensor, got ", weight->toString(), " ",
                weight->defined() ? weight->sizes() : at::IntArrayRef());
    TORCH_CHECK(weight->numel() > 0, "packing wants a weight with elements, got ", weight->sizes());
    refuse_grad(*weight, "packing a weight");
    *out = new Tensor(reorder_weight(weight->detach()));
  });
}

// The dense weight again.
char *te_unpack_weight(const Tensor *packed, Tensor **out) {
  return guarded([&] { *out = new Tensor(packed->to_dense()); });
}

char *te_packed_linear(const Tensor *x, const Tensor *packed, Tensor **out) {
  return guarded([&] {
    check_linear(*x, *packed);
    refuse_grad(*x, "packed linear");
    *out = new Tensor(packed_linear(*x, *packed));
  });
}

// tch's run_backward seeds with ones and takes scalars only. grads[i] is left null where
// inputs[i] was not used.
char *te_run_backward(const Tensor *const *outputs, const Tensor *const *grad_outputs,
                      size_t n_outputs, const Tensor *const *inputs, size_t n_inputs,
                      bool keep_graph, Tensor **grads) {
  return guarded([&] {
    auto result = torch::autograd::grad(gathered(outputs, n_outputs), gathered(inputs, n_inputs),
                                        gathered(grad_outputs, n_outputs), keep_graph,
                                        /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0; i < n_inputs; i++)
      if (result[i].defined()) grads[i] = new Tensor(result[i]);
  });
}

// One pass over parameter, gradient and both moments, where tch's operations take eight and a
// temporary of the parameter's size.
char *te_fused_adamw(Tensor *parameter, const Tensor *grad, Tensor *exp_avg, Tensor *exp_avg_sq,
                     double step, double lr, double beta1, double beta2, double eps,
                     double weight_decay) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    for (const Tensor *t : {grad, static_cast<const Tensor *>(exp_avg),
                            static_cast<const Tensor *>(exp_avg_sq)})
      TORCH_CHECK(t->sizes() == parameter->sizes() && t->scalar_type() == parameter->scalar_type(),
                  "fused AdamW: the parameter is ", parameter->toString(), " ", parameter->sizes(),
                  ", its gradient or a moment ", t->toString(), " ", t->sizes());
    auto steps = at::full({}, step, parameter->options().dtype(at::kFloat));
    at::_fused_adamw_({*parameter}, {*grad}, {*exp_avg}, {*exp_avg_sq}, {}, {steps}, lr, beta1,
                      beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false);
  });
}

// libtorch's own threads: a second pool beside them would compete with theirs, which spin for a
// while after each operation.
char *te_parallel_for(size_t count, void (*body)(void *, size_t, size_t), void *context) {
  return guarded([&] {
    at::parallel_for(0, static_cast<int64_t>(count), 1,
                     [&](int64_t begin, int64_t end) { body(context, begin, end); });
  });
}

size_t te_num_threads() { return static_cast<size_t>(at::get_num_threads()); }
}
