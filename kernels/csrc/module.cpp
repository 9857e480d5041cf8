// torchrec_mtrains.kernels._core: the native boundary. Each bind_*.cpp binds one half; nothing else knows Python.
#include <nanobind/nanobind.h>

#include "errors.h"

namespace nb = nanobind;

void bind_caches(nb::module_& m);
void bind_device(nb::module_& m);
void bind_inspector(nb::module_& m);
void bind_probes(nb::module_& m);
void bind_profiler(nb::module_& m);
void bind_requests(nb::module_& m);
void bind_slots(nb::module_& m);
void bind_trace(nb::module_& m);
void bind_volumes(nb::module_& m);

namespace {

const char* class_name(mtrains::ErrorKind kind) {
  using K = mtrains::ErrorKind;
  switch (kind) {
    case K::kConfiguration: return "ConfigurationError";
    case K::kIdOutOfRange: return "IdOutOfRangeError";
    case K::kPoolTooSmall: return "PoolTooSmallError";
    case K::kTicket: return "TicketError";
    case K::kVolume: return "VolumeError";
    case K::kVolumeFull: return "VolumeFullError";
    case K::kVolumeLocked: return "VolumeLockedError";
    case K::kVolumeMismatch: return "VolumeMismatchError";
    case K::kDamagedRecord: return "DamagedRecordError";
    case K::kVolumeIo: return "VolumeIoError";
    case K::kDevice: return "DeviceError";
  }
  return "MTrainsError";
}

}  // namespace

NB_MODULE(_core, m) {
  nb::set_leak_warnings(false);  // a model that is alive when the interpreter ends is no leak
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const mtrains::Error& e) {
      nb::object errors = nb::module_::import_("torchrec_mtrains.errors");
      PyErr_SetString(errors.attr(class_name(e.kind())).ptr(), e.what());
    }
  });
  bind_volumes(m);
  bind_caches(m);
  bind_slots(m);
  bind_trace(m);
  bind_device(m);
  bind_inspector(m);
  bind_probes(m);
  bind_profiler(m);
  bind_requests(m);
}
