#include "tools/files/files.h"

#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "gtest/gtest.h"

namespace nsa::tools {
namespace {

TEST(FilesTest, WritesIntoANewFolder) {
  const std::string folder = ::testing::TempDir() + "/files_test/a/b";
  ASSERT_TRUE(MakeFolder(folder).ok());
  ASSERT_TRUE(MakeFolder(folder).ok());
  const std::string path = folder + "/text";
  for (const std::string& contents : {std::string("old and longer"), std::string("n\0ew", 4)}) {
    const absl::Status status = WriteFile(path, contents);
    ASSERT_TRUE(status.ok()) << status;
    std::ifstream file(path, std::ios::binary);
    std::ostringstream read;
    read << file.rdbuf();
    EXPECT_EQ(read.str(), contents);
  }
  // Nothing else is left beside it.
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) files += entry.exists();
  EXPECT_EQ(files, 1);
}

TEST(FilesTest, NamesThePathAndTheReason) {
  const std::string path = ::testing::TempDir() + "/no/such/folder/text";
  const absl::Status status = WriteFile(path, "x");
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_NE(status.message().find(path), std::string::npos) << status;
  ASSERT_TRUE(WriteFile(::testing::TempDir() + "/plain_file", "x").ok());
  EXPECT_FALSE(MakeFolder(::testing::TempDir() + "/plain_file/folder").ok());
}

TEST(FilesTest, ReplacesNothingButFiles) {
  const std::string path = ::testing::TempDir() + "/pipe";
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  const absl::Status status = WriteFile(path, "x");
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find(path), std::string::npos) << status;
  EXPECT_TRUE(std::filesystem::is_fifo(path));
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace nsa::tools
