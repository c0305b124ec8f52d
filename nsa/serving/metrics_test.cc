#include "nsa/serving/metrics.h"

#include <arpa/inet.h>
#include <httplib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <regex>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nsa/service_testlib.h"
#include "nsa/serving/metrics_server.h"

namespace nsa::serving {
namespace {

using testing::HasSubstr;

// Every line as the text format has it, and each metric announced before its samples.
void ExpectWellFormed(const std::string& text) {
  ASSERT_TRUE(!text.empty() && text.back() == '\n');
  const std::regex head(R"(# (HELP|TYPE) (nsa_[a-z_]+) .+)");
  const std::regex sample(
      R"((nsa_[a-z_]+?)(_bucket|_sum|_count)?(\{[a-z]+="[^"]+"\})? [0-9.e+-]+)");
  std::string announced;
  std::smatch match;
  for (const std::string& line :
       std::vector<std::string>(absl::StrSplit(text, '\n', absl::SkipEmpty()))) {
    if (std::regex_match(line, match, head)) {
      announced = match[2];
    } else {
      ASSERT_TRUE(std::regex_match(line, match, sample)) << line;
      EXPECT_TRUE(line.starts_with(announced)) << line;
    }
  }
}

TEST(MetricsTest, ShowsWhatTheStatsSay) {
  ServiceStats stats;
  stats.mutable_health()->set_state(ServiceHealth::DRAINING);
  stats.set_pages(12);
  stats.set_pages_used(5);
  stats.add_pages_used_of_rank(2);
  stats.add_pages_used_of_rank(3);
  stats.set_bytes_fetched(int64_t{1} << 40);
  (*stats.mutable_requests_by_code())["OK"] = 7;
  (*stats.mutable_requests_by_code())["CANCELLED"] = 1;
  for (double bound : {0.001, 0.1}) stats.mutable_step_seconds()->add_bounds(bound);
  for (int count : {4, 2, 1}) stats.mutable_step_seconds()->add_counts(count);
  stats.mutable_step_seconds()->set_sum(1234567.25);
  const std::string text = FormatMetrics(stats);
  ExpectWellFormed(text);
  for (const char* part : {
           "# TYPE nsa_health gauge\nnsa_health{state=\"SERVING\"} 0\n",
           "nsa_health{state=\"DRAINING\"} 1\n",
           "# TYPE nsa_pages_used gauge\nnsa_pages_used 5\n",
           "nsa_pages_used_of_rank{rank=\"0\"} 2\nnsa_pages_used_of_rank{rank=\"1\"} 3\n",
           "# TYPE nsa_fetched_bytes_total counter\nnsa_fetched_bytes_total 1099511627776\n",
           "nsa_requests_total{code=\"CANCELLED\"} 1\nnsa_requests_total{code=\"OK\"} 7\n",
           "# TYPE nsa_step_seconds histogram\n"
           "nsa_step_seconds_bucket{le=\"0.001\"} 4\n"
           "nsa_step_seconds_bucket{le=\"0.1\"} 6\n"
           "nsa_step_seconds_bucket{le=\"+Inf\"} 7\n"
           "nsa_step_seconds_sum 1234567.25\n"
           "nsa_step_seconds_count 7\n",
       }) {
    EXPECT_THAT(text, HasSubstr(part));
  }
}

std::unique_ptr<Service> MakeService() {
  return *Service::Create(
      SmallService(), std::move((*comm::LoopbackGroup::Create(1))[0]),
      std::shared_ptr<kernels::Kernels>(*kernels::CpuKernels::Create({.num_threads = 1})));
}

TEST(MetricsTest, AreServed) {
  auto service = MakeService();
  auto client = *service->Connect();
  TokensRequest request(client->Control(Open(), absl::InfiniteFuture())->sequence(), {0, 1, 2});
  ASSERT_TRUE(client->Submit(request.request).ok());
  ASSERT_TRUE(client->Next(absl::InfiniteFuture())->status.ok());

  auto server = *MetricsServer::Start(*service, /*port=*/0);
  const absl::Status taken = MetricsServer::Start(*service, server->port()).status();
  EXPECT_TRUE(absl::IsUnavailable(taken));
  EXPECT_THAT(taken.message(), HasSubstr("127.0.0.1:"));
  httplib::Client http("127.0.0.1", server->port());
  const auto metrics = http.Get("/metrics");
  ASSERT_TRUE(metrics && metrics->status == 200);
  EXPECT_EQ(metrics->get_header_value("Content-Type"), "text/plain; version=0.0.4; charset=utf-8");
  ExpectWellFormed(metrics->body);
  for (const char* part :
       {"nsa_sequences 1\n", "nsa_pages 64\n", "nsa_pages_used 1\n",
        "nsa_appended_tokens_total 3\n", "nsa_step_seconds_count 1\n", "nsa_queue_depth 0\n",
        "nsa_clients 1\n", "nsa_requests_total{code=\"OK\"} 2\n",
        "nsa_health{state=\"SERVING\"} 1\n"}) {
    EXPECT_THAT(metrics->body, HasSubstr(part));
  }
  EXPECT_EQ(http.Get("/healthz")->status, 200);
  EXPECT_EQ(http.Get("/healthz")->body, "SERVING\n");
  EXPECT_EQ(http.Get("/other")->status, 404);
  EXPECT_TRUE(service->Drain(absl::InfiniteFuture()).ok());
  EXPECT_EQ(http.Get("/healthz")->status, 503);
  EXPECT_EQ(http.Get("/healthz")->body, "DRAINING\n");
}

TEST(MetricsTest, NoClientHoldsUpTheOthers) {
  auto service = MakeService();
  auto server = *MetricsServer::Start(*service, /*port=*/0);
  std::vector<int> silent(8);
  for (int& client : silent) {
    client = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(server->port());
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    ASSERT_EQ(connect(client, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  ASSERT_EQ(send(silent[0], "GET /metr", 9, 0), 9);
  httplib::Client keeper("127.0.0.1", server->port()), other("127.0.0.1", server->port());
  keeper.set_keep_alive(true);
  for (httplib::Client* client : {&keeper, &other}) {
    client->set_read_timeout(20);  // on a busy host
    const auto health = client->Get("/healthz");
    ASSERT_TRUE(health) << httplib::to_string(health.error());
    EXPECT_EQ(health->status, 200);
  }
  const auto large = other.Post("/metrics", std::string(1 << 20, 'x'), "text/plain");
  EXPECT_TRUE(!large || large->status == 413);
  const absl::Time begin = absl::Now();
  server = nullptr;
  EXPECT_LT(absl::Now() - begin, absl::Seconds(4));
  for (int client : silent) close(client);
}

TEST(MetricsTest, ThePortMustBeOne) {
  auto service = MakeService();
  for (int port : {-1, 65536}) {
    const absl::Status status = MetricsServer::Start(*service, port).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(status.message(), HasSubstr(absl::StrCat("port = ", port)));
  }
}

}  // namespace
}  // namespace nsa::serving
