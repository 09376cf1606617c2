package cosbucket

import (
	"fmt"
	"net/http"
	"regexp"
	"testing"
)

func FuzzAnswerHeaders(f *testing.F) {
	f.Add("bytes 6000-15999/16000", int64(6000), "crc32c=n03x6A==,md5=Ojk9c3dhfxgoKVVHYwFbHQ==")
	f.Add("bytes 0-1/*", int64(0), "md5=,crc32c")
	f.Add("bytes -5-9/10", int64(-5), "md5=====")
	f.Add("bytes 5-4/5", int64(5), "md5=AA==, crc32c=AAAAAA==")
	sum := regexp.MustCompile(`^([0-9a-f]{32})?$`)
	crc := regexp.MustCompile(`^([0-9a-f]{8})?$`)
	f.Fuzz(func(t *testing.T, contentRange string, offset int64, hash string) {
		if size, err := total(contentRange, offset); err == nil && offset >= 0 {
			if again, err := total(fmt.Sprintf("bytes %d-%d/%d", offset, size-1, size), offset); err != nil || again != size ||
				size <= offset {
				t.Errorf("total(%q, %d) = %d, printed and parsed again %d, %v", contentRange, offset, size, again, err)
			}
		}
		if md5, crc32c := googHash(http.Header{"X-Goog-Hash": {hash}}); !sum.MatchString(md5) || !crc.MatchString(crc32c) {
			t.Errorf("googHash(%q) = %q, %q", hash, md5, crc32c)
		}
	})
}
