// One exception type with a kind; the bindings turn each kind into its class of torchrec_mtrains.errors.
#pragma once

#include <stdexcept>
#include <string>

namespace mtrains {

enum class ErrorKind {
  kConfiguration,
  kIdOutOfRange,
  kPoolTooSmall,
  kTicket,
  kVolume,
  kVolumeFull,
  kVolumeLocked,
  kVolumeMismatch,
  kDamagedRecord,
  kVolumeIo,
  kDevice,
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace mtrains
