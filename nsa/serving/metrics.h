// A service's statistics in Prometheus' text format 0.0.4.
#ifndef NSA_SERVING_METRICS_H_
#define NSA_SERVING_METRICS_H_

#include <string>

#include "nsa/service.pb.h"

namespace nsa::serving {

std::string FormatMetrics(const ServiceStats& stats);

}  // namespace nsa::serving

#endif  // NSA_SERVING_METRICS_H_
