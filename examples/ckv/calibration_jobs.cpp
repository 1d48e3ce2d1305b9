#include "calibration_jobs.hpp"

#include <fcntl.h>
#include <fmt/core.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "engine/error.hpp"
#include "terminal.hpp"

namespace ckv {
namespace {

// A process writes lines into its pipe: each record, null at the end of a task, a string where it failed.

void write_line(int pipe, const Json& line) {
  // An answer cut off by the token limit may end inside a character.
  const std::string text = line.dump(-1, ' ', false, Json::error_handler_t::replace) + '\n';
  for (std::string_view rest = text; !rest.empty();) {
    const ssize_t written = write(pipe, rest.data(), rest.size());
    if (written > 0) {
      rest.remove_prefix(static_cast<std::size_t>(written));
    } else if (errno != EINTR) {
      _exit(1);  // nobody is there to read it
    }
  }
}

[[noreturn]] void work(int pipe, std::size_t first, std::size_t step, std::size_t tasks,
                       const std::function<Worker()>& start) {
  int code = 0;
  try {
    const Worker worker = start();
    for (std::size_t task = first; task < tasks; task += step) {
      worker(task, [&](const Json& record) { write_line(pipe, record); });
      write_line(pipe, nullptr);
    }
  } catch (const std::exception& error) {
    write_line(pipe, error.what());
    code = 1;
  }
  _exit(code);  // what the parent has open is the parent's to close
}

/// A process that works, killed and buried where it is let go: what it holds is its own memory.
class Process {
 public:
  Process(pid_t pid, int pipe) : pid_(pid), pipe_(pipe) {}
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;
  ~Process() {
    close(pipe_);
    kill(pid_, SIGKILL);
    int status = 0;
    while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
  }

  int pipe() const { return pipe_; }

  /// The next line it writes. Throws engine::Error where it ended without one.
  Json next_line() {
    std::size_t end = 0;
    while ((end = text_.find('\n', end)) == std::string::npos) {
      end = text_.size();
      read_more();
    }
    Json line = Json::parse(text_.substr(0, end));
    text_.erase(0, end + 1);
    return line;
  }

 private:
  void read_more() {
    pollfd readable{.fd = pipe_, .events = POLLIN, .revents = 0};
    constexpr int milliseconds = 200;  // between two looks at Ctrl-C
    while (poll(&readable, 1, milliseconds) <= 0) {
      check_interrupt();
    }
    std::array<char, 1 << 16> buffer{};
    const ssize_t count = read(pipe_, buffer.data(), buffer.size());
    check_interrupt();
    if (count <= 0) {
      throw engine::Error(
          "a process ended before its work was done: it may have run out of memory; where --jobs is given, "
          "use fewer");
    }
    text_.append(buffer.data(), static_cast<std::size_t>(count));
  }

  pid_t pid_;
  int pipe_;
  std::string text_;  // read, and not asked for yet
};

}  // namespace

void share_out(std::size_t tasks, std::size_t jobs, const std::function<Worker()>& start, const Take& take,
               const std::function<void(std::size_t task)>& done) {
  std::vector<std::unique_ptr<Process>> processes;
  jobs = std::min(jobs, tasks);
  std::fflush(nullptr);  // or each fork would write it again
  for (std::size_t job = 0; job < jobs; ++job) {
    std::array<int, 2> ends{};
    if (pipe2(ends.data(), O_CLOEXEC) != 0) {
      throw std::system_error(errno, std::generic_category(), "cannot make a pipe");
    }
    const pid_t parent = getpid();
    const pid_t pid = fork();
    if (pid == 0) {
      // It holds this process's files open, and locks on them: it must not outlive it.
      if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != parent) {
        _exit(1);
      }
      close(ends[0]);
      for (const auto& other : processes) {
        close(other->pipe());
      }
      work(ends[1], job, jobs, tasks, start);
    }
    const int failure = errno;
    close(ends[1]);
    if (pid < 0) {
      close(ends[0]);
      throw std::system_error(failure, std::generic_category(), "cannot start a process");
    }
    processes.push_back(std::make_unique<Process>(pid, ends[0]));
  }
  for (std::size_t task = 0; task < tasks; ++task) {
    Json line = processes[task % jobs]->next_line();
    for (; line.is_object(); line = processes[task % jobs]->next_line()) {
      take(line);
    }
    if (line.is_string()) {
      check_interrupt();  // it may have seen Ctrl-C first
      throw engine::Error(line.get<std::string>());
    }
    done(task);
  }
}

}  // namespace ckv
