// A link and a mailbox in memory that a file holds, which the processes of one machine map.
#pragma once

#include <sys/mman.h>

#include <memory>

#include "link.h"
#include "mailbox.h"

namespace gf {

class SharedLink {
  void* const memory_;
  const size_t bytes_;

 public:
  Link link;
  Mailbox mailbox;

  static size_t bytes(int ranks, size_t part_bytes) { return Mailbox::bytes() + Link::bytes(ranks, part_bytes); }

  // Null: it cannot be mapped, and errno says why. Its decoders own it with whoever opened it.
  static std::shared_ptr<SharedLink> open(int file, int rank, int ranks, size_t part_bytes, double seconds, int spins) {
    const size_t bytes = SharedLink::bytes(ranks, part_bytes);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) return nullptr;
    auto* const rest = static_cast<std::byte*>(memory) + Mailbox::bytes();
    return std::shared_ptr<SharedLink>(
        new SharedLink(memory, bytes, Link(rest, rank, ranks, part_bytes, seconds, spins)));
  }

  SharedLink(const SharedLink&) = delete;
  ~SharedLink() { munmap(memory_, bytes_); }

 private:
  SharedLink(void* memory, size_t bytes, const Link& link_in)
      : memory_(memory), bytes_(bytes), link(link_in), mailbox(memory, link) {}
};

}  // namespace gf
