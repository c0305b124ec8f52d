#include "nsa/serving/metrics_server.h"

#include <httplib.h>
#include <sys/socket.h>

#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace nsa::serving {
namespace {

constexpr char kHost[] = "127.0.0.1";
constexpr int kMaxPort = 65535;
// A client that says nothing, or keeps its connection, holds off the others and the server's end
// for a second at most.
constexpr int kThreads = 4;
constexpr int kTimeoutSeconds = 1;
constexpr size_t kMaxBodyBytes = 1024;

class MetricsServerImpl : public MetricsServer {
 public:
  explicit MetricsServerImpl(Service& service) {
    server_.new_task_queue = [] { return new httplib::ThreadPool(kThreads); };
    server_.set_keep_alive_max_count(1);
    server_.set_keep_alive_timeout(kTimeoutSeconds);
    server_.set_read_timeout(kTimeoutSeconds);
    server_.set_write_timeout(kTimeoutSeconds);
    server_.set_payload_max_length(kMaxBodyBytes);
    server_.Get("/metrics", [&service](const httplib::Request&, httplib::Response& response) {
      response.set_content(service.MetricsText(), "text/plain; version=0.0.4; charset=utf-8");
    });
    server_.Get("/healthz", [&service](const httplib::Request&, httplib::Response& response) {
      const ServiceHealth health = service.Health();
      response.status = health.state() == ServiceHealth::SERVING ? 200 : 503;
      response.set_content(
          absl::StrCat(ServiceHealth::State_Name(health.state()), "\n", health.reason()),
          "text/plain; charset=utf-8");
    });
  }
  ~MetricsServerImpl() override {
    server_.stop();
    if (thread_.joinable()) thread_.join();
  }

  absl::Status Listen(int port) {
    if (port < 0 || port > kMaxPort) {
      return absl::InvalidArgumentError(
          absl::StrCat("port = ", port, ": must lie in [0, ", kMaxPort, "]"));
    }
    // The library's own options let several servers share a port.
    server_.set_socket_options([](socket_t socket) {
      const int yes = 1;
      setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
    });
    if (port == 0) {
      port_ = server_.bind_to_any_port(kHost);
    } else if (server_.bind_to_port(kHost, port)) {
      port_ = port;
    }
    if (port_ < 0) {
      return absl::UnavailableError(absl::StrCat("can't listen on ", kHost, ":", port));
    }
    thread_ = std::thread([this] { server_.listen_after_bind(); });
    // It can be stopped only once it runs.
    while (!server_.is_running()) absl::SleepFor(absl::Milliseconds(1));
    return absl::OkStatus();
  }

  int port() const override { return port_; }

 private:
  httplib::Server server_;
  std::thread thread_;
  int port_ = -1;
};

}  // namespace

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Start(Service& service, int port) {
  auto server = std::make_unique<MetricsServerImpl>(service);
  if (absl::Status status = server->Listen(port); !status.ok()) return status;
  return server;
}

}  // namespace nsa::serving
