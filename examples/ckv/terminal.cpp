#include "terminal.hpp"

#include <fmt/core.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <utility>

#include "usage_error.hpp"

namespace ckv {
namespace {

std::atomic<bool> interrupted{false};
static_assert(std::atomic<bool>::is_always_lock_free, "a signal handler may set it");

bool stderr_is_terminal() {
  static const bool is_terminal = isatty(STDERR_FILENO) == 1;
  return is_terminal;
}

}  // namespace

void catch_interrupts() {
  struct sigaction action = {};
  action.sa_handler = [](int) { interrupted = true; };
  // Back to the default after the first, so that a second one ends a program that does not look.
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigaction(SIGINT, &action, nullptr);
}

void check_interrupt() {
  if (interrupted) {
    throw Interrupted();
  }
}

std::string duration_text(std::chrono::seconds duration) {
  const auto seconds = duration.count();
  if (seconds >= 3600) {
    return fmt::format("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
  }
  return fmt::format("{}:{:02}", seconds / 60, seconds % 60);
}

Progress::Progress(std::string label, double total) : label_(std::move(label)), total_(total) {}

Progress::~Progress() { clear(); }

void Progress::clear() {
  if (std::exchange(shown_, false)) {
    std::fputs("\r\033[K", stderr);
    std::fflush(stderr);
  }
}

void Progress::show(double done, std::string_view note) {
  using namespace std::chrono_literals;
  const auto now = Clock::now();
  if (!stderr_is_terminal() || (shown_ && now - shown_at_ < 100ms)) {
    return;
  }
  const double share = total_ > 0 ? std::clamp(done / total_, 0.0, 1.0) : 0.0;
  std::string left;
  const auto spent = now - start_;
  if (share > 0.01 && spent > 3s) {
    const auto rest = std::chrono::duration_cast<std::chrono::seconds>(spent * ((1.0 - share) / share));
    left = fmt::format("  {} left", duration_text(rest));
  }
  constexpr int width = 24;
  const int full = static_cast<int>(share * width);
  fmt::print(stderr, "\r\033[K{} [{:=<{}}{:{}}] {:3.0f} %{}  {}", label_, "", full, "", width - full,
             100.0 * share, left, note);
  std::fflush(stderr);
  shown_ = true;
  shown_at_ = now;
}

}  // namespace ckv
