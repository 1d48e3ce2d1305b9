// How fast N sequences decode with their whole caches, and compressed, in one context and one run:
//
//     llama_cpp_throughput MODEL.gguf --sequences 8 --tokens 7900 --rows 240
//
// One prompt is read, in a context of its own, with and without being observed; every sequence gets a copy of
// its cache in cells of its own, as if it had read it. The small context has room for what is kept alone.
#include <llama.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <compresskv/adapt/llama_cpp.hpp>
#include <compresskv/io/calibration_files.hpp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ckv = compresskv;
using ckv::llama_cpp::Observer;
using ckv::llama_cpp::Place;
using ckv::llama_cpp::Sequence;

namespace {

struct Free {
  void operator()(llama_model* model) const { llama_model_free(model); }
  void operator()(llama_context* context) const { llama_free(context); }
};
using Model = std::unique_ptr<llama_model, Free>;
using Context = std::unique_ptr<llama_context, Free>;

struct Options {
  std::string model;
  std::size_t sequences = 8;
  std::size_t tokens = 7900;
  std::size_t rows = 240;
  std::size_t steps = 32;
  std::size_t rounds = 2;
  std::string method = "snapkv";
  std::string heads;
  bool flash_attention = true;
  std::int32_t threads = 2;
};

double seconds(auto&& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double mib(std::size_t bytes) { return static_cast<double>(bytes) / 1048576.0; }

/// Memory of the process that lies in RAM now: Linux alone.
double resident_mib() {
  std::ifstream status("/proc/self/statm");
  std::size_t all = 0;
  std::size_t resident = 0;
  status >> all >> resident;
  return mib(resident * 4096);
}

Context make_context(llama_model* model, const Options& options, std::size_t sequences, std::size_t cells,
                     Observer* observer) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<std::uint32_t>(sequences * cells);
  params.n_seq_max = static_cast<std::uint32_t>(sequences);
  params.kv_unified = true;
  params.flash_attn_type =
      options.flash_attention ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  params.n_threads = options.threads;
  params.n_threads_batch = options.threads;
  if (observer != nullptr) observer->attach(params);
  Context context{llama_init_from_model(model, params)};
  if (!context) throw std::runtime_error("cannot make a context");
  return context;
}

/// Tokens a second of `steps` steps, a token a sequence each, behind position `next` - 1; they are taken
/// back.
double decode(llama_context* context, std::size_t sequences, std::size_t next, std::size_t steps) {
  std::vector<llama_token> tokens(sequences, 100);
  std::vector<llama_pos> positions(sequences);
  std::vector<std::int32_t> ones(sequences, 1);
  std::vector<llama_seq_id> numbers(sequences);
  std::vector<llama_seq_id*> ids(sequences);
  std::vector<std::int8_t> logits(sequences, 1);
  for (std::size_t i = 0; i < sequences; ++i) {
    numbers[i] = static_cast<llama_seq_id>(i);
    ids[i] = &numbers[i];
  }
  const auto step = [&](std::size_t number) {
    std::ranges::fill(positions, static_cast<llama_pos>(next + number));
    const llama_batch batch{.n_tokens = static_cast<std::int32_t>(sequences),
                            .token = tokens.data(),
                            .embd = nullptr,
                            .pos = positions.data(),
                            .n_seq_id = ones.data(),
                            .seq_id = ids.data(),
                            .logits = logits.data()};
    if (llama_decode(context, batch) != 0) throw std::runtime_error("llama_decode failed");
    llama_synchronize(context);
  };
  step(0);  // the first one makes its graph
  const double time = seconds([&] {
    for (std::size_t i = 1; i <= steps; ++i) step(i);
  });
  for (const llama_seq_id id : numbers) {
    llama_memory_seq_rm(llama_get_memory(context), id, static_cast<llama_pos>(next), -1);
  }
  return static_cast<double>(sequences * steps) / time;
}

void run(const Options& options) {
  const Model model{llama_model_load_from_file(options.model.c_str(), llama_model_default_params())};
  if (!model) throw std::runtime_error("cannot load " + options.model);
  ckv::MethodSettings settings{.budget = ckv::Budget::tokens_per_layer(options.rows)};
  if (!options.heads.empty()) settings.heads = ckv::io::load_head_ranking(options.heads);
  const ckv::AnyPlan plan{ckv::llama_cpp::model_shape(model.get()), options.method, settings};
  Observer observer{plan.shape(), plan.window()};

  std::vector<llama_token> prompt(options.tokens);
  for (std::size_t i = 0; i < prompt.size(); ++i) {
    prompt[i] = static_cast<llama_token>(100 + (i * i * 31 + i * 7) % 20000);
  }
  const std::size_t cells = options.tokens + options.steps + 16;
  Context reading = make_context(model.get(), options, 1, cells, &observer);
  Sequence one{plan, observer, {.context = reading.get()}};
  // Unobserved, observed, and again: what the machine does meanwhile falls on both.
  const auto plain = [&] {
    for (std::size_t first = 0; first < prompt.size(); first += llama_n_batch(reading.get())) {
      const std::size_t count = (std::min)(std::size_t{llama_n_batch(reading.get())}, prompt.size() - first);
      if (llama_decode(reading.get(),
                       llama_batch_get_one(prompt.data() + first, static_cast<std::int32_t>(count))) != 0) {
        throw std::runtime_error("llama_decode failed");
      }
    }
    llama_synchronize(reading.get());
  };
  const auto clear = [&] { llama_memory_seq_rm(llama_get_memory(reading.get()), 0, -1, -1); };
  double unobserved = std::numeric_limits<double>::infinity();
  double observed = unobserved;
  for (std::size_t round = 0; round < options.rounds; ++round) {
    clear();
    unobserved = (std::min)(unobserved, seconds(plain));
    clear();
    observed = (std::min)(observed, seconds([&] { one.read(prompt), llama_synchronize(reading.get()); }));
  }
  std::printf("prefill of %zu tokens: %.2f s, observed %.2f s: %+.2f %% (the shortest of %zu each)\n",
              options.tokens, unobserved, observed, 100.0 * (observed / unobserved - 1.0), options.rounds);

  const double before_full = resident_mib();
  Context full = make_context(model.get(), options, options.sequences, cells, nullptr);
  std::vector<std::uint8_t> state(llama_state_seq_get_size(reading.get(), 0));
  llama_state_seq_get_data(reading.get(), state.data(), state.size(), 0);
  std::vector<Sequence> sequences;
  for (std::size_t i = 0; i < options.sequences; ++i) {
    const Place place{.context = full.get(), .sequence = static_cast<llama_seq_id>(i)};
    if (llama_state_seq_set_data(full.get(), state.data(), state.size(), place.sequence) == 0) {
      throw std::runtime_error("no room for the sequences");
    }
    observer.copy(one.place(), place);
    sequences.emplace_back(plan, observer, place);
  }
  std::vector<std::uint8_t>().swap(state);
  const double full_speed = decode(full.get(), options.sequences, options.tokens, options.steps);
  const double with_full = resident_mib();  // with what decoding needs, as the other is

  ckv::llama_cpp::Compressed done;
  const double compression = seconds([&] {
    for (Sequence& sequence : sequences) done = sequence.compress();
  });
  std::printf(
      "compression: %.3f s a sequence, %.2f %% of its prefill; %zu of %zu rows, state %.2f of %.2f MiB\n",
      compression / static_cast<double>(options.sequences),
      100.0 * compression / static_cast<double>(options.sequences) / unobserved, done.rows_after,
      done.rows_before, mib(done.bytes_after), mib(done.bytes_before));
  const double speed = decode(full.get(), options.sequences, options.tokens, options.steps);

  const std::size_t few = (options.rows + options.steps + 16 + 255) / 256 * 256;
  Context small = make_context(model.get(), options, options.sequences, few, nullptr);
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    sequences[i].compress_into({.context = small.get(), .sequence = static_cast<llama_seq_id>(i)});
  }
  full.reset();
  const double small_speed = decode(small.get(), options.sequences, options.tokens, options.steps);
  const double with_small = resident_mib();

  // The cells of one whole sequence, filled with compressed ones.
  const std::size_t many =
      (std::min)(cells / (options.rows + options.steps + 1), llama_max_parallel_sequences());
  Context packed = make_context(model.get(), options, many, cells / many, nullptr);
  state.resize(llama_state_seq_get_size(small.get(), 0));
  llama_state_seq_get_data(small.get(), state.data(), state.size(), 0);
  for (std::size_t i = 0; i < many; ++i) {
    if (llama_state_seq_set_data(packed.get(), state.data(), state.size(), static_cast<llama_seq_id>(i)) ==
        0) {
      throw std::runtime_error("no room for the compressed sequences");
    }
  }
  const double packed_speed = decode(packed.get(), many, options.tokens, options.steps);
  packed.reset();

  for (std::size_t i = 0; i < sequences.size(); ++i) {
    llama_memory_seq_rm(llama_get_memory(small.get()), static_cast<llama_seq_id>(i), -1, -1);
    Sequence fresh{plan, observer, {.context = small.get(), .sequence = static_cast<llama_seq_id>(i)}};
    std::vector<llama_token> short_prompt(prompt.begin(),
                                          prompt.begin() + static_cast<std::ptrdiff_t>(options.rows));
    Context scratch = make_context(model.get(), options, 1, options.rows + 16, &observer);
    Sequence read{plan, observer, {.context = scratch.get()}};
    read.read(short_prompt);
    read.compress_into(fresh.place());
  }
  const double fresh_speed = decode(small.get(), options.sequences, options.rows, options.steps);
  std::printf("decode of %zu sequences, flash attention %s, tokens/s:\n", options.sequences,
              options.flash_attention ? "on" : "off");
  std::printf("  full %.1f, compressed in the same context %.1f (%.2f x), in a small context %.1f (%.2f x)\n",
              full_speed, speed, speed / full_speed, small_speed, small_speed / full_speed);
  std::printf("  a fresh context that read %zu tokens: %.1f; compressed is %.2f of it\n", options.rows,
              fresh_speed, small_speed / fresh_speed);
  std::printf("  %zu compressed in the cells of one whole: %.1f (%.2f x)\n", many, packed_speed,
              packed_speed / full_speed);
  std::printf(
      "process: %.0f MiB before the full context, %.0f with it, %.0f with the small one in its place\n",
      before_full, with_full, with_small);
}

}  // namespace

int main(int argc, char** argv) try {
  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
      },
      nullptr);
  Options options;
  CLI::App app{"How fast N sequences decode with their whole caches, and compressed, in llama.cpp"};
  app.add_option("model", options.model, "A GGUF file")->required()->check(CLI::ExistingFile);
  app.add_option("--sequences", options.sequences, "How many")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--tokens", options.tokens, "Of each prompt")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--rows", options.rows, "That each layer keeps")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--steps", options.steps, "Of decoding")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--rounds", options.rounds, "Of prefill, observed and not")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--method", options.method, "By name")->capture_default_str();
  app.add_option("--heads", options.heads, "Head ranking that the method reads")->check(CLI::ExistingFile);
  app.add_option("--threads", options.threads)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_flag("--flash-attention,!--no-flash-attention", options.flash_attention, "On unless turned off");
  CLI11_PARSE(app, argc, argv);
  run(options);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
