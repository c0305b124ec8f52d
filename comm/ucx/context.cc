#include "comm/ucx/context.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace nsa::comm::ucx {
namespace {

// Room for our header and UCX's in a segment.
constexpr int64_t kSegmentOverhead = 1024;

// What UCX_TLS says; "all" when it is not set. UCX tells only by printing its configuration.
std::string TransportsOfEnvironment() {
  ucp_config_t* raw_config = nullptr;
  if (ucp_config_read(nullptr, nullptr, &raw_config) != UCS_OK) return "all";
  const Config config(raw_config);
  char* text = nullptr;
  size_t size = 0;
  FILE* const file = open_memstream(&text, &size);
  if (file == nullptr) return "all";
  ucp_config_print(config.get(), file, "", UCS_CONFIG_PRINT_CONFIG);
  std::fclose(file);
  std::string transports = "all";
  for (absl::string_view line : absl::StrSplit(absl::string_view(text, size), '\n')) {
    if (absl::ConsumePrefix(&line, "UCX_TLS=")) transports = std::string(line);
  }
  std::free(text);
  return transports;
}

}  // namespace

std::string ChooseTransports(const std::string& tls) {
  if (!tls.empty()) return tls;
  const std::string transports = TransportsOfEnvironment();
  return transports == "all" ? kHostTransports : transports;
}

bool AreHostTransports(absl::string_view tls) {
  constexpr absl::string_view kNames[] = {"sm",    "shm", "mm",   "posix", "sysv",
                                          "xpmem", "cma", "knem", "tcp",   "self"};
  const std::vector<absl::string_view> parts = absl::StrSplit(tls, ',');
  return std::all_of(parts.begin(), parts.end(), [&](absl::string_view part) {
    return std::find(std::begin(kNames), std::end(kNames), part) != std::end(kNames);
  });
}

absl::StatusOr<Context> MakeContext(const std::string& tls, const std::string& net_devices,
                                    bool copied_sends) {
  ucp_config_t* raw_config = nullptr;
  if (ucs_status_t s = ucp_config_read(nullptr, nullptr, &raw_config); s != UCS_OK) {
    return UcsError("ucp_config_read", s);
  }
  const Config config(raw_config);
  const std::string segment = absl::StrCat(kSegmentBytes + kSegmentOverhead);
  const std::pair<const char*, std::string> settings[] = {
      {"TLS", tls},
      {"NET_DEVICES", net_devices},
      // Without this, shared memory is left out of endpoints that report errors (UCX 1.13).
      {"MM_ERROR_HANDLING", "y"},
      // Every message goes as one segment, copied: see RemoteReads for why.
      {"ZCOPY_THRESH", copied_sends ? "inf" : ""},
      {"RNDV_THRESH", copied_sends ? "inf" : ""},
      {"TCP_TX_SEG_SIZE", segment},
      {"TCP_RX_SEG_SIZE", segment},
      {"MM_SEG_SIZE", segment},
  };
  for (const auto& [name, value] : settings) {
    if (value.empty()) continue;
    if (ucs_status_t s = ucp_config_modify(config.get(), name, value.c_str()); s != UCS_OK) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": '", value, "'; UCX does not take it: ", ucs_status_string(s)));
    }
  }
  ucp_params_t params = {};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP;
  ucp_context_h context = nullptr;
  if (ucs_status_t s = ucp_init(&params, config.get(), &context); s != UCS_OK) {
    if (!tls.empty() || !net_devices.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("tls, net_devices: '", tls, "', '", net_devices,
                       "'; UCX must find a transport: ", ucs_status_string(s)));
    }
    return UcsError("ucp_init", s);
  }
  return Context(context);
}

bool MovesCudaMemory(ucp_context_h context) {
  ucp_context_attr_t attributes = {};
  attributes.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES;
  return ucp_context_query(context, &attributes) == UCS_OK &&
         (attributes.memory_types & UCS_BIT(UCS_MEMORY_TYPE_CUDA)) != 0;
}

}  // namespace nsa::comm::ucx
