// Reads a head ranking from the file named by the only argument; the target compresskv::io brings the JSON
// library along.

#include <compresskv/io/calibration_files.hpp>
#include <cstdio>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::puts("give one file");
    return 2;
  }
  const compresskv::HeadRanking ranking = compresskv::io::load_head_ranking(argv[1]);
  std::printf("%zu layers, best head of the last %u\n", ranking.layers(),
              ranking.heads(ranking.layers() - 1)[0]);
}
