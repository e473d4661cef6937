#pragma once

#include <torch/csrc/stable/library.h>

// Where the operators are: torch.ops.cce, and for a build that is loaded beside others, as the Hugging Face
// Hub's are, whatever the build says (CMake's CCE_NAMESPACE). cce_ext/_ops.py is its Python side.
#ifndef CCE_NAMESPACE
#define CCE_NAMESPACE cce
#endif

// An operator's full name: CCE_OPERATOR("lce_forward") is "cce::lce_forward".
#define CCE_STRING_OF(x) #x
#define CCE_STRING(x) CCE_STRING_OF(x)
#define CCE_OPERATOR(name) CCE_STRING(CCE_NAMESPACE) "::" name

// torch's own macros take the namespace as it is written, so it has to be expanded before they see it.
#define CCE_EXPAND_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define CCE_EXPAND_LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define CCE_TORCH_LIBRARY(m) CCE_EXPAND_LIBRARY(CCE_NAMESPACE, m)
#define CCE_TORCH_LIBRARY_IMPL(key, m) CCE_EXPAND_LIBRARY_IMPL(CCE_NAMESPACE, key, m)
