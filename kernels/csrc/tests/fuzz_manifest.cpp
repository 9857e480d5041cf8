// Bytes as a manifest: what decodes encodes to something that decodes to the same, anything else is a typed error.
// An input whose first byte is odd gets the magic, version and checksum that belong to it, so that the fuzzer comes behind them.
#include <cstdlib>
#include <cstring>

#include "errors.h"
#include "manifest.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace mtrains;
  if (size < 1) return 0;
  const auto* begin = reinterpret_cast<const std::byte*>(data);
  std::vector<std::byte> bytes(begin + 1, begin + size);
  if (data[0] & 1) {
    const std::vector<std::byte> empty = Manifest{}.encode();
    if (bytes.size() < 16) bytes.resize(16);
    std::memcpy(bytes.data(), empty.data(), 12);
    const uint32_t crc = crc32c(0, bytes.data(), bytes.size() - 4);
    std::memcpy(bytes.data() + bytes.size() - 4, &crc, 4);
  }
  try {
    const std::vector<std::byte> again = Manifest::decode(bytes, "file").encode();
    if (Manifest::decode(again, "file").encode() != again) std::abort();
  } catch (const Error&) {
  }
  return 0;
}
