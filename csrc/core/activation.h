// The activation functions that linear has in its epilogue and activation as an op, by name:
//
//   none z   relu max(z, 0)   relu2 max(z, 0)^2   silu z / (1 + e^-z)   tanh   gelu z Phi(z)
//   gelu_tanh z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))
//
// Phi is the distribution function of the normal distribution.
#pragma once

namespace warpformer {

enum class Activation : int { none, relu, relu2, silu, tanh, gelu, gelu_tanh };
/// Whether `name` is one of them, and which.
bool is_activation(const char* name, Activation& activation);

}  // namespace warpformer
