#pragma once

// Compression in llama.cpp, over the public API of an unmodified libllama (0.5 or later): see
// docs/llama_cpp.md. Link `compresskv::llama_cpp`, or `compresskv::runtime` and libllama.

#include "compresskv/adapt/llama_cpp/model.hpp"     // which models; the shape of one
#include "compresskv/adapt/llama_cpp/observer.hpp"  // sees the last queries while libllama computes them
#include "compresskv/adapt/llama_cpp/sequence.hpp"  // reads, compresses, copies and truncates one sequence
#include "compresskv/adapt/llama_cpp/state.hpp"     // the state of a sequence as a view
