// Serves what a service tells of itself over HTTP, to this host alone:
//   /metrics  in Prometheus' text format
//   /healthz  the state's name; 200 while it is SERVING, else 503
#ifndef NSA_SERVING_METRICS_SERVER_H_
#define NSA_SERVING_METRICS_SERVER_H_

#include <memory>

#include "absl/status/statusor.h"
#include "nsa/service.h"

namespace nsa::serving {

class MetricsServer {
 public:
  // Listens on 127.0.0.1:`port`, 0: any free one. `service` must outlive it. InvalidArgument when
  // there is no such port, Unavailable when it can't be had.
  static absl::StatusOr<std::unique_ptr<MetricsServer>> Start(Service& service, int port);
  virtual ~MetricsServer() = default;
  virtual int port() const = 0;
};

}  // namespace nsa::serving

#endif  // NSA_SERVING_METRICS_SERVER_H_
