// The real model with its layers on two other machines: two servers of ggml's RPC backend on loopback.
// Queries and cells then lie in memory that nothing here points into; what is kept is what the local run
// keeps.

#include <fcntl.h>
#include <ggml-backend.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <compresskv/adapt/llama_cpp.hpp>
#include <compresskv/core/budget.hpp>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "any_model.hpp"
#include "llama_fixture.hpp"
#include "tiny_model.hpp"

namespace adapt_test {
namespace {

using compresskv::Budget;
using llama_cpp::Observer;
using llama_cpp::Sequence;

// Kernels may share work by the number of threads, so it is the same here and there. More than one would wait
// for one another: servers and this process take turns on the same processors.
constexpr std::int32_t threads = 1;

/// A socket of loopback; `port` 0 takes a free one.
class Socket {
 public:
  Socket() : file_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {}
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  ~Socket() { close(file_); }

  std::uint16_t free_port() const {
    sockaddr_in address = loopback(0);
    socklen_t size = sizeof(address);
    auto* any = static_cast<sockaddr*>(static_cast<void*>(&address));
    if (bind(file_, any, size) != 0 || getsockname(file_, any, &size) != 0) {
      throw std::runtime_error("no free port on loopback");
    }
    return ntohs(address.sin_port);
  }
  bool connects(std::uint16_t port) const {
    const sockaddr_in address = loopback(port);
    return connect(file_, static_cast<const sockaddr*>(static_cast<const void*>(&address)),
                   sizeof(address)) == 0;
  }

 private:
  static sockaddr_in loopback(std::uint16_t port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
  }
  int file_;
};

/// A server in a process of its own, ended with this object.
class Server {
 public:
  Server() {
    const std::uint16_t port = Socket().free_port();
    const std::string port_text = std::to_string(port);
    std::array<std::string, 3> words = {COMPRESSKV_RPC_SERVER, port_text, std::to_string(threads)};
    std::array<char*, 4> arguments = {words[0].data(), words[1].data(), words[2].data(), nullptr};
    posix_spawn_file_actions_t quiet;
    posix_spawn_file_actions_init(&quiet);
    posix_spawn_file_actions_addopen(&quiet, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_adddup2(&quiet, STDOUT_FILENO, STDERR_FILENO);
    const int failed = posix_spawn(&process_, arguments[0], &quiet, nullptr, arguments.data(), environ);
    posix_spawn_file_actions_destroy(&quiet);
    if (failed != 0) {
      throw std::runtime_error("cannot start " + words[0]);
    }
    endpoint_ = "127.0.0.1:" + port_text;
    for (int tries = 0; !Socket().connects(port); ++tries) {
      if (tries == 600 || waitpid(process_, nullptr, WNOHANG) == process_) {
        throw std::runtime_error("the server at " + endpoint_ + " does not answer");
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  }
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;
  ~Server() {
    kill(process_, SIGKILL);
    waitpid(process_, nullptr, 0);
  }

  const char* endpoint() const { return endpoint_.c_str(); }

 private:
  pid_t process_ = 0;
  std::string endpoint_;
};

/// The device of a server; null where this libllama knows no RPC.
ggml_backend_dev_t device_of(const char* endpoint) {
  using Add = ggml_backend_reg_t (*)(const char*);
  ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
  const auto add =
      reinterpret_cast<Add>(ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server"));
  ggml_backend_reg_t server = add(endpoint);
  return server == nullptr ? nullptr : ggml_backend_reg_dev_get(server, 0);
}

struct Outcome {
  std::vector<std::uint32_t> kept;  // of layers and heads one after the other
  std::vector<std::uint8_t> state;
  std::vector<std::vector<float>> logits;
};

/// A prompt is read, and what is kept of it goes on in a smaller context.
Outcome run(llama_model* of, const AnyPlan& plan, std::span<const llama_token> prompt, bool flash_attention) {
  Observer observer{llama_cpp::model_shape(of), plan.window()};
  const Context large =
      make_context(of, &observer, {.cells = 512, .flash_attention = flash_attention, .micro_batch = 48});
  const Context small = make_context(of, &observer, {.cells = 256, .flash_attention = flash_attention});
  for (llama_context* context : {large.get(), small.get()}) {
    llama_set_n_threads(context, threads, threads);
  }
  Sequence sequence{plan, observer, {.context = large.get()}};
  sequence.read(prompt);
  sequence.compress_into({.context = small.get()});
  Outcome out;
  for (std::size_t layer = 0; layer < plan.shape().layers; ++layer) {
    const compresskv::Retained& retained = sequence.compressor().retained(layer);
    for (std::size_t list = 0; list < retained.lists(); ++list) {
      out.kept.insert(out.kept.end(), retained.positions(list).begin(), retained.positions(list).end());
    }
  }
  out.state = state_of(small.get(), 0);
  out.logits = greedy(small.get(), 0, 107, 4);
  return out;
}

void expect_same(const Outcome& there, const Outcome& here) {
  EXPECT_EQ(there.kept, here.kept);
  EXPECT_TRUE(there.state == here.state);
  EXPECT_TRUE(there.logits == here.logits);
}

/// Two servers, and parameters of a model whose layers lie on both.
class LlamaCppRpc : public testing::Test {
 protected:
  void SetUp() override {
    start_libllama();
    ggml_backend_load_all();
    if (ggml_backend_reg_by_name("RPC") == nullptr) {
      GTEST_SKIP() << "this libllama was built without its RPC backend (GGML_RPC)";
    }
    for (Machine& machine : machines_) {
      machine.server.emplace();
      machine.device = device_of(machine.server->endpoint());
      ASSERT_NE(machine.device, nullptr);
    }
    devices_ = {machines_[0].device, machines_[1].device, nullptr};
  }

  llama_model_params split() {
    llama_model_params params = whole();
    params.devices = devices_.data();
    params.n_gpu_layers = 1000;
    params.split_mode = LLAMA_SPLIT_MODE_LAYER;
    params.tensor_split = halves_.data();
    return params;
  }
  static llama_model_params whole() {
    llama_model_params params = llama_model_default_params();
    // The servers repack no weights for their processor. Nor does this process then: bits are compared.
    params.use_extra_bufts = false;
    return params;
  }

 private:
  struct Machine {
    std::optional<Server> server;
    ggml_backend_dev_t device = nullptr;
  };
  std::array<Machine, 2> machines_;
  std::array<ggml_backend_dev_t, 3> devices_{};
  std::vector<float> halves_ = std::vector<float>(llama_max_devices(), 1.0F);
};

TEST_F(LlamaCppRpc, TinyModelKeepsWhatTheLocalRunKeeps) {
  const Tiny tiny{.architecture = "qwen3", .layers = 4, .kv_heads = 1};
  const Model local = make(tiny, whole());
  const Model remote = make(tiny, split());
  const AnyPlan plan = plan_of(llama_cpp::model_shape(local.get()), "snapkv", 40);
  for (const bool flash_attention : {true, false}) {
    SCOPED_TRACE(flash_attention);
    expect_same(run(remote.get(), plan, prompt_of(remote.get()), flash_attention),
                run(local.get(), plan, prompt_of(local.get()), flash_attention));
  }
}

TEST_F(LlamaCppRpc, RealModelKeepsWhatTheLocalRunKeeps) {
  if (model_path().empty()) {
    GTEST_SKIP() << "COMPRESSKV_TEST_MODEL is not set: name the .gguf file that scripts/model.sh fetches";
  }
  const Model local = load(model_path(), whole());
  const Model remote = load(model_path(), split());
  const AnyPlan model_wide = plan("model-wide", Budget::tokens_per_layer(24));
  expect_same(run(remote.get(), model_wide, some_tokens(60), true),
              run(local.get(), model_wide, some_tokens(60), true));
}

}  // namespace
}  // namespace adapt_test
