// A server of ggml's RPC backend over this machine's processor, as rpc-server of llama.cpp is one:
//
//     llama_cpp_rpc_server PORT THREADS
//
// Serves on loopback until it is ended, or until the program that has started it ends.

#include <ggml-backend.h>
#include <sys/prctl.h>

#include <charconv>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <string>

int main(int count, char** arguments) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  std::size_t threads = 0;
  if (count != 3 ||
      std::from_chars(arguments[2], arguments[2] + std::strlen(arguments[2]), threads).ptr == arguments[2]) {
    std::fputs("usage: llama_cpp_rpc_server PORT THREADS\n", stderr);
    return 2;
  }
  ggml_backend_load_all();
  ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
  ggml_backend_dev_t processor = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  if (rpc == nullptr || processor == nullptr) {
    std::fputs("this libllama has no RPC backend\n", stderr);
    return 3;
  }
  using Start = void (*)(const char* endpoint, const char* cache, std::size_t threads, std::size_t devices,
                         ggml_backend_dev_t* list);
  const auto start =
      reinterpret_cast<Start>(ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_start_server"));
  if (start == nullptr) {
    std::fputs("this libllama's RPC backend starts no servers\n", stderr);
    return 3;
  }
  start(("127.0.0.1:" + std::string(arguments[1])).c_str(), nullptr, threads, 1, &processor);
  std::fputs("the server has ended\n", stderr);
  return 1;
}
