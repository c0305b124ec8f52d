#include "tools/safetensors.h"

#include <sys/stat.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace nsa::tools {
namespace {

using Bytes = std::vector<std::byte>;

// A folder of this test alone, empty.
std::string Folder() {
  const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
  std::string folder =
      absl::StrCat(::testing::TempDir(), "/safetensors_", test->test_suite_name(), test->name());
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  return folder;
}

Bytes Counting(int64_t num_bytes) {
  Bytes bytes(num_bytes);
  for (int64_t i = 0; i < num_bytes; ++i) bytes[i] = static_cast<std::byte>(i * 7 + 3);
  return bytes;
}

template <typename T>
absl::Span<const std::byte> AsBytes(const std::vector<T>& values) {
  return {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)};
}

// A file with this header text and `data_bytes` bytes after it; the length may lie.
Bytes File(const std::string& text, int64_t data_bytes, int64_t lie = 0) {
  Bytes file(8 + text.size() + data_bytes, std::byte{0});
  const uint64_t length = text.size() + lie;
  std::memcpy(file.data(), &length, 8);
  std::memcpy(file.data() + 8, text.data(), text.size());
  return file;
}

std::string ErrorOf(const Bytes& contents) {
  const auto file = SafetensorsFile::Parse(contents, "x");
  if (file.ok()) return "OK";
  EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(file.status().message());
}

std::string ErrorOf(const std::string& text, int64_t data_bytes) {
  return ErrorOf(File(text, data_bytes));
}

TEST(SafetensorsTest, RoundTrip) {
  const std::string path = Folder() + "/t.safetensors";
  const Bytes a = Counting(6), b = Counting(24), c = Counting(8);
  const std::vector<TensorView> tensors = {
      {{"odd \"name\" \n\u00e9", TensorType::kBF16, {1, 3}}, a},
      {{"f", TensorType::kF32, {3, 2}}, b},
      {{"scalar", TensorType::kI64, {}}, c},
      {{"empty", TensorType::kI32, {4, 0, 2}}, {}},
  };
  ASSERT_TRUE(WriteSafetensors(path, tensors, {{"key", "value"}, {"", "\u00fc"}}).ok());
  const auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->metadata(),
            (std::map<std::string, std::string>{{"key", "value"}, {"", "\u00fc"}}));
  ASSERT_EQ(file->tensors().size(), 4u);
  for (const TensorView& tensor : tensors) {
    const TensorView* read = file->Find(tensor.spec.name);
    ASSERT_NE(read, nullptr) << tensor.spec.name;
    EXPECT_EQ(read->spec, tensor.spec);
    EXPECT_EQ(read->bytes, tensor.bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(read->bytes.data()) % SizeOf(read->spec.type), 0u);
  }
  // The first tensor is that with the largest elements, on a cache line of the file.
  EXPECT_EQ(file->tensors()[0].spec.name, "scalar");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(file->tensors()[0].bytes.data()) % 64, 0u);
  EXPECT_EQ(file->Find("none"), nullptr);
  EXPECT_EQ(file->Get("none").status().message(),
            absl::StrCat("file \"", path.substr(0, 80), "\"", path.size() > 80 ? "..." : "",
                         ": has no tensor \"none\""));
}

TEST(SafetensorsTest, EveryTypeHasItsSizeAndName) {
  const std::string path = Folder() + "/t.safetensors";
  std::vector<TensorView> tensors;
  const Bytes bytes = Counting(8 * 5);
  for (int i = 0; i <= static_cast<int>(TensorType::kF64); ++i) {
    const TensorType type = static_cast<TensorType>(i);
    tensors.push_back({{std::string(NameOf(type)), type, {5}},
                       absl::MakeConstSpan(bytes).subspan(0, 5 * SizeOf(type))});
  }
  ASSERT_TRUE(WriteSafetensors(path, tensors).ok());
  const auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  for (const TensorView& tensor : tensors) {
    const TensorView* read = file->Find(tensor.spec.name);
    ASSERT_NE(read, nullptr);
    EXPECT_EQ(read->spec, tensor.spec);
    EXPECT_EQ(read->bytes, tensor.bytes);
  }
  EXPECT_EQ(NameOf(TensorType::kBF16), "BF16");
  EXPECT_EQ(SizeOf(TensorType::kBF16), 2);
  EXPECT_EQ(NameOf(TensorType::kF64), "F64");
}

TEST(SafetensorsTest, MisalignedTensorsAreCopied) {
  const std::string text = R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                           R"("x":{"dtype":"F64","shape":[2],"data_offsets":[1,17]}})";
  Bytes contents = File(text, 17);
  const Bytes data = Counting(17);
  std::copy(data.begin(), data.end(), contents.end() - 17);
  auto parsed = SafetensorsFile::Parse(contents, "x");
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const SafetensorsFile file = *std::move(parsed);  // copies move along
  const TensorView* x = file.Find("x");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(x->bytes.data()) % 8, 0u);
  EXPECT_EQ(Bytes(x->bytes.begin(), x->bytes.end()), Bytes(data.begin() + 1, data.end()));
}

TEST(SafetensorsTest, EmptyFileOfTensors) {
  EXPECT_EQ(ErrorOf("{}", 0), "OK");
  EXPECT_EQ(ErrorOf("{}    ", 0), "OK");
  EXPECT_EQ(ErrorOf(R"({"__metadata__":{"a":"b"}})", 0), "OK");
}

TEST(SafetensorsTest, LengthThatLies) {
  EXPECT_EQ(ErrorOf(Bytes(7)), "file \"x\": 7 bytes: must have at least 8");
  EXPECT_EQ(ErrorOf(File("{}", 0, 1)),
            "file \"x\": header length = 3: must be at most the 2 bytes that follow");
  EXPECT_EQ(ErrorOf(File("{}", 0, int64_t{1} << 62)),
            "file \"x\": header length = 4611686018427387906: must be at most 100000000");
  EXPECT_EQ(ErrorOf(File("{}", 0, -3)),
            "file \"x\": header length = 18446744073709551615: must be at most 100000000");
  EXPECT_EQ(ErrorOf(File("{}", 0, -2)), "file \"x\": header: must begin with {");
  EXPECT_EQ(ErrorOf(File("{}", 0, -1)), "file \"x\": header: not JSON at byte 2");
}

TEST(SafetensorsTest, TextThatIsNotTheFormat) {
  EXPECT_EQ(ErrorOf(" {}", 0), "file \"x\": header: must begin with {");
  EXPECT_EQ(ErrorOf("{} {}", 0), "file \"x\": header: not JSON at byte 4");
  EXPECT_EQ(ErrorOf("{\"a\":\"\xff\"}", 0), "file \"x\": header: not JSON at byte 7");
  EXPECT_EQ(ErrorOf(R"({"a":1})", 0), "file \"x\": tensor \"a\" = 1: must be an object");
  EXPECT_EQ(ErrorOf(R"({"a":[]})", 0), "file \"x\": tensor \"a\" = [: must be an object");
  EXPECT_EQ(ErrorOf(R"({"__metadata__":{"a":{}}})", 0),
            "file \"x\": \"__metadata__\": \"a\" = {: must be a string");
  EXPECT_EQ(ErrorOf(R"({"a":{}})", 0),
            "file \"x\": tensor \"a\": must have dtype, shape and data_offsets");
  EXPECT_EQ(ErrorOf(R"({"a":{"color":1}})", 0),
            "file \"x\": tensor \"a\": field \"color\": must be dtype, shape or data_offsets");
  EXPECT_EQ(ErrorOf(R"({"a":{"dtype":1}})", 0),
            "file \"x\": tensor \"a\": \"dtype\" = 1: must be a string");
  EXPECT_NE(
      ErrorOf(R"({"a":{"dtype":"F17"}})", 0).find("\"dtype\" = \"F17\": must be one of BOOL, U8, "),
      std::string::npos);
  EXPECT_EQ(ErrorOf(R"({"a":{"shape":"x"}})", 0),
            "file \"x\": tensor \"a\": \"shape\" = \"x\": must be an array of integers >= 0");
}

TEST(SafetensorsTest, NumbersThatAreNone) {
  for (const std::string number :
       {"-1", "1.0", "1e3", "18446744073709551616", "null", "true", "[1]", "{}", "\"1\""}) {
    const std::string error =
        ErrorOf(absl::StrCat(R"({"a":{"dtype":"U8","shape":[)", number, "]}}"), 0);
    EXPECT_NE(error.find("tensor \"a\": \"shape\" = "), std::string::npos) << error;
    EXPECT_NE(error.find("must be an array of integers >= 0"), std::string::npos) << error;
  }
  EXPECT_EQ(ErrorOf(R"({"a":{"data_offsets":[0,9223372036854775808]}})", 0),
            "file \"x\": tensor \"a\": \"data_offsets\" = 9223372036854775808: must be at most "
            "2^63 - 1");
  EXPECT_EQ(ErrorOf(R"({"a":{"data_offsets":[0]}})", 0),
            "file \"x\": tensor \"a\": \"data_offsets\" = 1 numbers: must be two");
  EXPECT_EQ(ErrorOf(R"({"a":{"data_offsets":[0,1,2]}})", 0),
            "file \"x\": tensor \"a\": \"data_offsets\" = 3 numbers: must be two");
}

TEST(SafetensorsTest, NamesTwice) {
  const std::string a = R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]})";
  EXPECT_EQ(ErrorOf(absl::StrCat("{", a, ",", a, "}"), 1),
            "file \"x\": tensor \"a\": must come once");
  EXPECT_EQ(ErrorOf(R"({"a":{"shape":[1],"shape":[1]}})", 1),
            "file \"x\": tensor \"a\": \"shape\" = again: must come once");
}

TEST(SafetensorsTest, ManyLevels) {
  for (const char* open : {"{\"a\":", "["}) {
    std::string text = "{\"a\":";
    for (int i = 0; i < 1'000'000; ++i) text += open;
    EXPECT_NE(ErrorOf(text, 0), "OK");
  }
}

// One or two tensors with these places.
std::string Text(const std::string& shape_a, const std::string& offsets_a,
                 const std::string& offsets_b = "") {
  std::string text = absl::StrCat(R"({"a":{"dtype":"I32","shape":[)", shape_a,
                                  R"(],"data_offsets":[)", offsets_a, "]}");
  if (!offsets_b.empty()) {
    absl::StrAppend(&text, R"(,"b":{"dtype":"I32","shape":[2],"data_offsets":[)", offsets_b, "]}");
  }
  return text + "}";
}

TEST(SafetensorsTest, Places) {
  EXPECT_EQ(ErrorOf(Text("2", "0,8", "8,16"), 16), "OK");
  EXPECT_EQ(ErrorOf(Text("2", "8,16", "0,8"), 16), "OK");
  EXPECT_EQ(ErrorOf(Text("0", "8,8", "0,8"), 8), "OK");
  EXPECT_EQ(ErrorOf(Text("2", "0,8", "4,12"), 12),
            "file \"x\": tensor \"b\": data_offsets = [4, 12]: must begin at 8, where the tensor "
            "before it ends");
  EXPECT_EQ(ErrorOf(Text("2", "0,8", "0,8"), 8),
            "file \"x\": tensor \"b\": data_offsets = [0, 8]: must begin at 8, where the tensor "
            "before it ends");
  EXPECT_EQ(ErrorOf(Text("2", "0,8", "12,20"), 20),
            "file \"x\": tensor \"b\": data_offsets = [12, 20]: must begin at 8, where the tensor "
            "before it ends");
  EXPECT_EQ(ErrorOf(Text("0", "4,4", "0,8"), 8),
            "file \"x\": tensor \"a\": data_offsets = [4, 4]: must begin at 8, where the tensor "
            "before it ends");
  EXPECT_EQ(ErrorOf(Text("2", "0,8"), 9),
            "file \"x\": tensors end at 8 of the 9 bytes after the header: must fill them");
  EXPECT_EQ(
      ErrorOf(Text("2", "0,8"), 7),
      "file \"x\": tensor \"a\": data_offsets = [0, 8]: must lie within the 7 bytes after the "
      "header");
  EXPECT_EQ(ErrorOf(Text("2", "8,0"), 8),
            "file \"x\": tensor \"a\": data_offsets = [8, 0]: must ascend");
  EXPECT_EQ(ErrorOf(Text("3", "0,8"), 8),
            "file \"x\": tensor \"a\": data_offsets = [0, 8]: must span 12 bytes, for I32 [3]");
}

TEST(SafetensorsTest, ShapesThatOverflow) {
  // 2^62 elements of 4 bytes are 0 bytes when the product wraps.
  EXPECT_EQ(ErrorOf(Text("4611686018427387904", "0,0"), 0),
            "file \"x\": tensor \"a\": shape = [4611686018427387904] of I32: must have at most "
            "2^63 - 1 bytes");
  EXPECT_NE(ErrorOf(Text("4294967296,4294967296", "0,0"), 0).find("must have at most"),
            std::string::npos);
  EXPECT_NE(ErrorOf(Text("0,4294967296,4294967296", "0,0"), 0).find("must have at most"),
            std::string::npos);
  EXPECT_EQ(ErrorOf(Text("0,4294967296", "0,0"), 0), "OK");
}

TEST(SafetensorsTest, LongNamesAreCutInMessages) {
  const std::string error = ErrorOf(absl::StrCat("{\"", std::string(100000, 'a'), "\":1}"), 0);
  EXPECT_LT(error.size(), 200u);
}

TEST(SafetensorsTest, OpenNamesWhatIsWrongWithThePath) {
  const std::string folder = Folder();
  EXPECT_EQ(SafetensorsFile::Open(folder + "/none").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(SafetensorsFile::Open(folder).status().code(), absl::StatusCode::kInvalidArgument);
  ASSERT_EQ(mkfifo((folder + "/pipe").c_str(), 0600), 0);
  EXPECT_EQ(SafetensorsFile::Open(folder + "/pipe").status().code(),
            absl::StatusCode::kInvalidArgument);
  std::ofstream(folder + "/empty").flush();
  EXPECT_EQ(SafetensorsFile::Open(folder + "/empty").status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(SafetensorsTest, EveryTruncationIsRefused) {
  const std::string path = Folder() + "/t.safetensors";
  const Bytes bytes = Counting(24);
  const std::vector<TensorView> tensors = {{{"a", TensorType::kF32, {3, 2}}, bytes}};
  ASSERT_TRUE(WriteSafetensors(path, tensors).ok());
  for (int64_t size = static_cast<int64_t>(std::filesystem::file_size(path)) - 1; size >= 0;
       --size) {
    std::filesystem::resize_file(path, size);
    ASSERT_EQ(SafetensorsFile::Open(path).status().code(), absl::StatusCode::kInvalidArgument)
        << size;
  }
}

TEST(SafetensorsWriterTest, StreamsInTurns) {
  const std::string path = Folder() + "/t.safetensors";
  const Bytes bytes = Counting(16);
  const auto part = [&](int64_t begin, int64_t count) {
    return absl::MakeConstSpan(bytes).subspan(begin, count);
  };
  auto writer =
      SafetensorsWriter::Create(path, {{"a", TensorType::kU8, {16}}, {"b", TensorType::kF32, {2}}});
  ASSERT_TRUE(writer.ok()) << writer.status();
  EXPECT_TRUE(writer->Append("a", part(0, 5)).ok());
  EXPECT_TRUE(writer->Append("b", part(0, 8)).ok());
  EXPECT_TRUE(writer->Append("a", part(5, 10)).ok());
  EXPECT_EQ(writer->Append("b", part(0, 1)).message(),
            "tensor \"b\": 1 bytes appended: must be at most 0, which are missing");
  EXPECT_EQ(writer->Append("c", {}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(writer->Finish().message(), "tensor \"a\": 15 of 16 bytes were written");
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_TRUE(writer->Append("a", part(15, 1)).ok());
  ASSERT_TRUE(writer->Finish().ok());
  EXPECT_EQ(writer->Append("a", {}).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(writer->Finish().code(), absl::StatusCode::kFailedPrecondition);
  const auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->Find("a")->bytes, absl::MakeConstSpan(bytes));
  EXPECT_EQ(file->Find("b")->bytes, part(0, 8));
}

TEST(SafetensorsWriterTest, LeavesTheOldFileUntilFinished) {
  const std::string folder = Folder(), path = folder + "/t.safetensors";
  std::ofstream(path) << "old";
  {
    auto writer = SafetensorsWriter::Create(path, {{"a", TensorType::kU8, {1}}});
    ASSERT_TRUE(writer.ok());
    EXPECT_EQ(std::filesystem::file_size(path), 3u);
  }
  EXPECT_EQ(std::filesystem::file_size(path), 3u);
  const auto entries = std::filesystem::directory_iterator(folder);
  EXPECT_EQ(std::distance(begin(entries), end(entries)), 1);
}

TEST(SafetensorsWriterTest, ReplacesNothingButFiles) {
  const std::string path = Folder() + "/pipe";
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  const absl::Status status = WriteSafetensors(path, {});
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_NE(status.message().find("must be a regular file"), std::string::npos) << status;
  EXPECT_TRUE(std::filesystem::is_fifo(path));
}

TEST(SafetensorsWriterTest, RefusesWhatNoReaderWouldTake) {
  const std::string path = Folder() + "/t.safetensors";
  const auto error = [&](const std::vector<TensorSpec>& specs,
                         const std::map<std::string, std::string>& metadata = {}) {
    const auto writer = SafetensorsWriter::Create(path, specs, metadata);
    EXPECT_EQ(writer.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(writer.status().message());
  };
  EXPECT_EQ(error({{"a", TensorType::kU8, {1}}, {"a", TensorType::kU8, {1}}}),
            "tensor \"a\": must come once");
  EXPECT_EQ(error({{"__metadata__", TensorType::kU8, {1}}}),
            "tensor \"__metadata__\": this name is reserved");
  EXPECT_EQ(error({{"a\xff", TensorType::kU8, {1}}}), "tensor \"a\\xff\": the name must be UTF-8");
  EXPECT_EQ(error({{"a", TensorType::kU8, {2, -1}}}),
            "tensor \"a\": shape = [2, -1]: extents must be >= 0");
  EXPECT_EQ(error({{"a", TensorType::kF64, {int64_t{1} << 60}}}),
            "tensor \"a\": shape = [1152921504606846976] of F64: must have at most 2^63 - 1 bytes");
  EXPECT_EQ(error({{"a", TensorType::kU8, {int64_t{1} << 62}},
                   {"b", TensorType::kU8, {int64_t{1} << 62}}}),
            "tensor \"b\": all tensors must have at most 2^63 - 1 bytes together");
  EXPECT_EQ(error({}, {{"k", "\xc3"}}), "metadata \"k\" = \"\\xc3\": must be UTF-8");
  EXPECT_EQ(SafetensorsWriter::Create("/nonexistent/folder/x", {}).status().code(),
            absl::StatusCode::kNotFound);
}

// Against the format's own implementation, where Python has it.
TEST(SafetensorsPythonTest, ReadsAndWritesTheSame) {
  if (std::system("python3 -c 'import numpy, safetensors.numpy' 2> /dev/null") != 0) {
    GTEST_SKIP() << "python3 cannot import safetensors and numpy";
  }
  const std::string folder = Folder();
  const std::vector<float> f = {1.5f, -2.0f, 3.25f, 0.0f, 5.0f, 6.0f};
  const std::vector<int64_t> i = {0, 3000000000};
  const std::vector<TensorView> tensors = {
      {{"f", TensorType::kF32, {2, 3}}, AsBytes(f)},
      {{"cu_seqlens", TensorType::kI64, {2}}, AsBytes(i)},
      {{"none", TensorType::kI32, {0}}, {}},
  };
  ASSERT_TRUE(WriteSafetensors(folder + "/ours", tensors, {{"made by", "us"}}).ok());
  std::ofstream(folder + "/check.py") << R"(
import sys, numpy, safetensors, safetensors.numpy
folder = sys.argv[1]
with safetensors.safe_open(folder + '/ours', 'numpy') as file:
    assert file.metadata() == {'made by': 'us'}, file.metadata()
ours = safetensors.numpy.load_file(folder + '/ours')
assert sorted(ours) == ['cu_seqlens', 'f', 'none'], sorted(ours)
assert ours['f'].dtype == numpy.float32 and ours['f'].tolist() == [[1.5, -2, 3.25], [0, 5, 6]]
assert ours['cu_seqlens'].dtype == numpy.int64 and ours['cu_seqlens'].tolist() == [0, 3000000000]
assert ours['none'].shape == (0,)
safetensors.numpy.save_file(
    {'b': numpy.arange(3, dtype=numpy.uint8), 'h': numpy.array([[1.0], [-2.0]], numpy.float16)},
    folder + '/theirs', metadata={'made by': 'them'})
)";
  const std::string command = absl::StrCat("python3 '", folder, "/check.py' '", folder, "'");
  ASSERT_EQ(std::system(command.c_str()), 0);
  const auto theirs = SafetensorsFile::Open(folder + "/theirs");
  ASSERT_TRUE(theirs.ok()) << theirs.status();
  EXPECT_EQ(theirs->metadata().at("made by"), "them");
  const TensorView* h = theirs->Find("h");
  ASSERT_NE(h, nullptr);
  EXPECT_EQ(h->spec, (TensorSpec{"h", TensorType::kF16, {2, 1}}));
  EXPECT_EQ(Bytes(h->bytes.begin(), h->bytes.end()),
            (Bytes{std::byte{0}, std::byte{0x3c}, std::byte{0}, std::byte{0xc0}}));
  ASSERT_NE(theirs->Find("b"), nullptr);
  EXPECT_EQ(theirs->Find("b")->bytes.size(), 3u);
}

}  // namespace
}  // namespace nsa::tools
