#include "terminal.hpp"

#include <fcntl.h>
#include <fmt/core.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <system_error>
#include <utility>

#include "engine/error.hpp"
#include "usage_error.hpp"

namespace ckv {
namespace {

std::atomic<int> caught{0};
static_assert(std::atomic<int>::is_always_lock_free, "a signal handler may set it");

bool stderr_is_terminal() {
  static const bool is_terminal = isatty(STDERR_FILENO) == 1;
  return is_terminal;
}

bool starts_character(char c) { return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U; }

/// A line of a table without the blanks at its end, which may be what made it too wide.
void print_line(std::string_view line, std::size_t width) {
  line = cut(line, width);
  fmt::print("{}\n", line.substr(0, line.find_last_not_of(' ') + 1));
}

}  // namespace

void catch_interrupts() {
  struct sigaction action = {};
  action.sa_handler = [](int signal) { caught = signal; };
  // Back to the default after the first, so that a second one ends a program that does not look.
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

void check_interrupt() {
  if (const int signal = caught; signal != 0) {
    throw Interrupted(signal);
  }
}

void open_standard_streams() {
  for (const int descriptor : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(descriptor, F_GETFD) == -1) {
      // The lowest free number is this one. Where it cannot be opened, nothing else can either.
      static_cast<void>(open("/dev/null", descriptor == STDIN_FILENO ? O_WRONLY : O_RDONLY));
    }
  }
}

void flush_stdout() {
  // Where an earlier write failed, errno is still its.
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
    const int failure = errno == 0 ? EIO : errno;
    throw engine::Error(fmt::format("cannot write to stdout: {}", std::generic_category().message(failure)));
  }
}

void complain(std::string_view message) {
  std::fprintf(stderr, "ckv: %.*s\n", static_cast<int>(message.size()), message.data());
}

std::string duration_text(std::chrono::seconds duration) {
  const auto seconds = duration.count();
  if (seconds >= 3600) {
    return fmt::format("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
  }
  return fmt::format("{}:{:02}", seconds / 60, seconds % 60);
}

std::size_t columns_of(int descriptor) {
  if (const char* text = std::getenv("COLUMNS"); text != nullptr) {
    const std::string_view digits = text;
    std::size_t columns = 0;
    const auto [end, failure] = std::from_chars(digits.data(), digits.data() + digits.size(), columns);
    if (failure == std::errc{} && end == digits.data() + digits.size() && columns > 0) {
      return columns;
    }
  }
  winsize size{};
  if (ioctl(descriptor, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) {
    return size.ws_col;
  }
  return isatty(descriptor) == 1 ? 80 : std::numeric_limits<std::size_t>::max();
}

std::string_view cut(std::string_view text, std::size_t columns) {
  std::size_t characters = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    characters += starts_character(text[i]) ? 1U : 0U;
    if (characters > columns) {
      return text.substr(0, i);
    }
  }
  return text;
}

void print_entry(std::string_view what, std::string_view text, std::size_t indent) {
  const std::size_t width = columns_of(STDOUT_FILENO);
  std::string line = fmt::format("{:<{}}", what, indent);
  std::size_t used = 0;  // words of this line
  while (!text.empty()) {
    // A word with the blanks before it, which are part of the layout.
    const std::size_t start = std::min(text.find_first_not_of(' '), text.size());
    const std::size_t end = std::min(text.find(' ', start), text.size());
    if (used > 0 && line.size() + end > width) {
      print_line(line, width);
      line.assign(std::min(indent, width / 2), ' ');
      text.remove_prefix(start);
      used = 0;
      continue;
    }
    line += text.substr(0, end);
    text.remove_prefix(end);
    ++used;
  }
  print_line(line, width);
}

void print_text(std::string_view text) { print_entry("", text, 0); }

Table::Table(std::vector<Column> columns) : columns_(std::move(columns)), width_(columns_of(STDOUT_FILENO)) {
  std::vector<std::string> titles;
  for (const Column& column : columns_) {
    titles.push_back(column.title);
  }
  row(titles);
}

void Table::row(const std::vector<std::string>& cells) const {
  std::string line;
  std::size_t used = 0;  // columns of this line by their widths, which are the same in every row
  for (std::size_t i = 0; i < cells.size(); ++i) {
    const Column& column = columns_[i];
    if (used > 0 && used + column.width > width_) {
      if (cells[i].empty() && i + 1 == cells.size()) {
        break;  // no line for nothing
      }
      print_line(line, width_);
      line = "  ";
      used = 2;
    }
    // One that is wider than its column still stands apart.
    line +=
        !line.empty() && !line.ends_with(' ') && (column.left || cells[i].size() >= column.width) ? " " : "";
    line += column.left ? fmt::format("{:<{}}", cells[i], column.width)
                        : fmt::format("{:>{}}", cells[i], column.width);
    used += column.width;
  }
  print_line(line, width_);
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
  share_ = std::max(share_, total_ > 0 ? std::clamp(done / total_, 0.0, 1.0) : 0.0);
  std::string left;
  const auto spent = now - start_;
  if (share_ > 0.01 && spent > 3s) {
    const auto rest = std::chrono::duration_cast<std::chrono::seconds>(spent * ((1.0 - share_) / share_));
    left = fmt::format("  {} left", duration_text(rest));
  }
  // A line as wide as the terminal would break in some.
  const std::size_t room = columns_of(STDERR_FILENO) - 1;
  const std::size_t width = std::min<std::size_t>(24, room / 5);
  const auto full = static_cast<std::size_t>(share_ * static_cast<double>(width));
  std::string text = fmt::format("{} [{:=<{}}{:{}}] {:3.0f} %{}  {}", label_, "", full, "", width - full,
                                 100.0 * share_, left, note);
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c >= 0 && c < ' '; }, ' ');
  fmt::print(stderr, "\r\033[K{}", cut(text, room));
  std::fflush(stderr);
  shown_ = true;
  shown_at_ = now;
}

}  // namespace ckv
